"""The same figures in a notebook, as objects of plotly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from traindiag.panels.figures import PANELS, Block, build
from traindiag.panels.figures.style import palette
from traindiag.panels.figures.text import shown
from traindiag.panels.figures.view import View, metric
from traindiag.record.catalogue import near
from traindiag.record.log import LogData

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def plot(log: LogData, what: str = "timeline", *, name: str = "run", theme: str = "light", **options: str) -> Figure:
    """One figure of a run.

    Args:
        log: What was recorded.
        what: A figure by its id, such as ``timeline`` or ``heads-over-time``, or a signal by its name.
        name: Of the run.
        theme: ``light`` or ``dark``.
        **options: As :func:`traindiag.panels.figures.build` takes them.

    Raises:
        ModuleNotFoundError: With what to install, if plotly is missing.
        ValueError: If there is neither such a figure nor such a signal, with near ones.
    """
    if "/" in what:
        view = View(name, log, theme, options)
        block = view.lines(what.replace("/", "-"), metric(what).capitalize(), what)
        if block is not None:
            return as_plotly(block, theme)
    found: list[str] = []
    for block in _blocks(log, name, theme, options):
        if block["id"] == what:
            return as_plotly(block, theme)
        found.append(block["id"])
    known = [*found, *log.history]
    raise ValueError(f"this run has no figure or signal {what!r}.{near(what, known)} There are {', '.join(known)}")


def _blocks(log: LogData, name: str, theme: str, options: dict[str, str]) -> Iterator[Block]:
    for panel in PANELS:
        if panel.id != "compare":
            blocks = build(panel.id, {name: log}, theme=theme, options={"slider": "inline", **options}).blocks
            yield from (b for b in blocks if b["kind"] == "figure")


def as_plotly(block: Block, theme: str = "light") -> Figure:
    """A figure block with its title, on a background of its own.

    Raises:
        ModuleNotFoundError: With what to install, if plotly is missing.
    """
    try:
        from plotly import graph_objects
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'figures in a notebook are plotly\'s, which is not installed: pip install "traindiag[report]"',
            name="plotly",
        ) from error
    colours = palette(theme)
    data: dict[str, Any] = block["figure"]
    laid = dict(data["layout"])
    title = {"text": shown(block["title"]), "x": 0.01, "xanchor": "left", "font": {"size": 15}}
    laid |= {"title": title, "paper_bgcolor": colours.surface, "margin": {**laid["margin"], "t": 88}}
    laid["height"] += 48
    return graph_objects.Figure(data=data["data"], layout=laid, frames=data.get("frames", []))
