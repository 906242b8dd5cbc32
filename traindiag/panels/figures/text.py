"""Names as figures show them: never as markup, and without what they all have in common."""

from __future__ import annotations

import html
from collections.abc import Sequence

from traindiag.alerts.text import printable


def shown(text: object) -> str:
    """Text for plotly, which takes tags and entities of any string for markup, and dollars for TeX.

    Example:
        >>> shown("<b>layer</b> & head")
        '&lt;b&gt;layer&lt;/b&gt; &amp; head'
    """
    return html.escape(printable(str(text)), quote=False).replace("$", "&#36;")


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin and end with.

    Example:
        >>> short_names(["model.blocks.0.attention", "model.blocks.11.attention"])
        ['blocks.0', 'blocks.11']
        >>> short_names(["head"])
        ['head']
    """
    parts = [name.split(".") for name in names]
    shortest = min((len(p) for p in parts), default=0)
    if len(set(names)) < 2:
        return list(names)
    front = 0
    while front < shortest - 1 and len({p[front] for p in parts}) == 1:
        front += 1
    back = 0
    while back < shortest - front - 1 and len({p[-1 - back] for p in parts}) == 1:
        back += 1
    front -= front > 0 and all(p[front].isdigit() for p in parts)  # a bare number says little
    return [".".join(p[front : len(p) - back]) for p in parts]
