"""Every figure that people look at, made in one place: for TensorBoard's tab, the report and notebooks.

Figures are plotly's, as plain data; neither plotly nor torch is needed to make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from traindiag.alerts.limits import Limit, default_limits
from traindiag.panels.figures.activation import activation_blocks
from traindiag.panels.figures.attention import attention_blocks
from traindiag.panels.figures.compare import compare_blocks
from traindiag.panels.figures.content import Block, Figure, PanelContent
from traindiag.panels.figures.gradient import gradient_blocks
from traindiag.panels.figures.output import output_blocks
from traindiag.panels.figures.overview import overview_blocks
from traindiag.panels.figures.plasticity import plasticity_blocks
from traindiag.panels.figures.stability import stability_blocks
from traindiag.panels.figures.view import View
from traindiag.record.catalogue import near
from traindiag.record.log import LogData

__all__ = ["PANELS", "Block", "Figure", "Panel", "PanelContent", "build"]


@dataclass(frozen=True)
class Panel:
    """One page of figures.

    Args:
        id: For links and files.
        title: For people.
        build: Makes its blocks of one or several runs.
        families: Families of signals that it shows.
    """

    id: str
    title: str
    build: Callable[[Sequence[View]], list[Block]]
    families: tuple[str, ...] = ()


def _each(one: Callable[[View], list[Block]]) -> Callable[[Sequence[View]], list[Block]]:
    """The blocks of each run, named by it where there are several."""

    def build(views: Sequence[View]) -> list[Block]:
        if len(views) == 1:
            return one(views[0])
        return [
            {**block, **({"id": f"{at}-{block['id']}"} if "id" in block else {}), "run": view.name}
            for at, view in enumerate(views)
            for block in one(view)
        ]

    return build


PANELS: tuple[Panel, ...] = (
    Panel("overview", "Overview", _each(overview_blocks)),
    Panel("attention", "Attention", _each(attention_blocks), ("attention",)),
    Panel("output", "Output", _each(output_blocks), ("output",)),
    Panel("gradients", "Gradients and updates", _each(gradient_blocks), ("gradient", "optimizer")),
    Panel("activations", "Activations", _each(activation_blocks), ("activation",)),
    Panel("plasticity", "Critic plasticity", _each(plasticity_blocks), ("plasticity",)),
    Panel("stability", "Stability gap", _each(stability_blocks), ("stability",)),
    Panel("compare", "Compare runs", compare_blocks),
)
"""In the order in which they are shown."""


def build(
    panel: str,
    logs: Mapping[str, LogData],
    *,
    theme: str = "light",
    options: Mapping[str, str] | None = None,
    limits: Mapping[str, Sequence[Limit]] | None = None,
) -> PanelContent:
    """Makes one panel.

    Args:
        panel: Id of one of :data:`PANELS`.
        logs: What was recorded, by the name to be shown of each run.
        theme: ``light`` or ``dark``.
        options: What was chosen: ``step``, ``signal``, ``cell`` (the label of a cell, or how it begins),
            ``severity``; ``slider=inline`` puts the steps of a heat map into the figure itself.
        limits: Lines to draw by signal, in place of those of the default rules.

    Raises:
        ValueError: If there is no such panel or theme.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.series import History
        >>> log = LogData(RunInfo(run_id="a"), History(), (), (), (0,), (), ())
        >>> [block["kind"] for block in build("attention", {"a": log}).blocks]
        ['note']
    """
    found = next((p for p in PANELS if p.id == panel), None)
    if found is None:
        ids = [p.id for p in PANELS]
        raise ValueError(f"there is no panel {panel!r}, only {', '.join(ids)}.{near(panel, ids)}")
    lines = default_limits() if limits is None else limits
    views = [View(name, log, theme, options or {}, lines) for name, log in logs.items()]
    for view in views:
        view.colours  # noqa: B018 - refuses an unknown theme, whatever the panel
    blocks = found.build(views) if views else [{"kind": "note", "text": "There is no run yet."}]
    return PanelContent(found.id, found.title, tuple(blocks))
