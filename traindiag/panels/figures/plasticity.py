"""The panel of critic plasticity: can the network still learn something new?"""

from __future__ import annotations

from traindiag.panels.figures.content import Block
from traindiag.panels.figures.view import View, metric, present


def plasticity_blocks(view: View) -> list[Block]:
    return present(
        [
            view.lines(name.replace("/", "-"), metric(name).capitalize(), name)
            for name in view.families.get("plasticity", ())
        ],
        "Nothing was measured of plasticity in this run: no monitor of it was on.",
    )
