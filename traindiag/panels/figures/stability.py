"""The panel of the stability gap: what happens to old tasks when a new one begins?"""

from __future__ import annotations

from traindiag.panels.figures.content import Block
from traindiag.panels.figures.view import View, metric, present


def stability_blocks(view: View) -> list[Block]:
    return present(
        [
            view.lines(name.replace("/", "-"), metric(name).capitalize(), name)
            for name in view.families.get("stability", ())
        ],
        "Nothing was measured of old tasks in this run: no monitor of the stability gap was on.",
    )
