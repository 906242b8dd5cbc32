"""The output panel: do the output logits drift, and is it learning that moves them?"""

from __future__ import annotations

from collections.abc import Sequence

from traindiag.panels.figures.content import Block, figure
from traindiag.panels.figures.view import View, present

Z = (("output/log_z", "log Z, mean", "solid"), ("output/log_z_max_abs", "|log Z|, largest", "dash"))
LOGITS = (
    ("output/logit_max", "largest", "solid"),
    ("output/logit_mean", "mean", "dash"),
    ("output/logit_min", "smallest", "solid"),
)


def output_blocks(view: View) -> list[Block]:
    return present(
        [
            together(view, "log-z", "Log Z of the output logits", Z, "log Z (nat)", _Z_NOTE),
            together(view, "logits", "Output logits", LOGITS, "logit", _LOGIT_NOTE),
            view.lines(
                "target-z-score",
                "How far the target stands out",
                "output/target_z_score",
                note="In standard deviations of its token's logits, free of their shift and scale: it rises while "
                "the model learns. Log Z that moves while this stands still is drift.",
            ),
            view.lines(
                "z-loss", "Z-loss", "output/z_loss", note="What a z-loss of weight one would add to the loss."
            ),
        ],
        "Nothing was seen of output logits in this run: no cross-entropy was recognised.",
    )


_Z_NOTE = "Far from zero as output logits drift, which cross-entropy leaves free."
_LOGIT_NOTE = "Of up to 128 tokens of each cross-entropy call. In a run that diverges they become very negative."


def together(
    view: View, id: str, title: str, signals: Sequence[tuple[str, str, str]], unit: str, note: str
) -> Block | None:
    """Several signals in one chart: colour tells them apart, and call sites where there are several by dash."""
    chart = view.chart(*(name for name, _, _ in signals), title=unit, log=False)
    for k, (name, label, dash) in enumerate(signals):
        series = view.series(name)
        if series is None:
            continue
        view.repeats(chart, name)
        several = len(series.cells) > 1
        for i in view.worst(series, 4):
            where = f" at {series.cells.label(i)}" if several else ""
            column = series.values[:, i], series.seen[:, i]
            chart.line(label + where, series.steps, *column, colour=view.colour(k), dash=dash)
    if chart.empty:
        return None
    view.dress(chart, *(name for name, _, _ in signals))
    return figure(id, title, chart.figure(), note)
