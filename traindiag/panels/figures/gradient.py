"""The panel of gradients and updates: their size, clipping, and what the optimizer makes of them."""

from __future__ import annotations

import numpy as np

from traindiag.panels.figures.chart import Chart, dimmed
from traindiag.panels.figures.content import Block, figure
from traindiag.panels.figures.view import View, labels_of, present
from traindiag.record.series import Series

NORM, APPLIED, CLIPPED = "gradient/norm", "gradient/norm_applied", "gradient/clip_rate"
RMS_T, SENTINEL = "optimizer/rms_t", "optimizer/sentinel_rms_t"
RATIO, EPSILON = "optimizer/update_ratio", "optimizer/grad_rms_over_eps"

USUAL_RATIO = (1e-4, 1e-1)
"""Sizes of an update against the weights that are taken for healthy: TheDeepChecker's band of -4 to -1 for log10."""


def gradient_blocks(view: View) -> list[Block]:
    by_block = "gradient/block_norm" if view.series("gradient/block_norm") is not None else "gradient/parameter_norm"
    return present(
        [
            norm(view),
            second_moment(view),
            view.by_place(
                "gradient-by-block",
                "Gradient norm by place",
                by_block,
                note="Before clipping, on a logarithmic scale. Vanishing and exploding gradients go with depth.",
            ),
            ratio(view),
            epsilon(view),
            view.by_place(
                "update-ratio-by-parameter",
                "Size of an update against the weights, by place",
                RATIO,
                note="The worst tensor of a place, on a logarithmic scale.",
            ),
            view.lines(
                "gradient-zeros", "Share of a gradient that is exactly zero", "gradient/zero_fraction", log=False
            ),
            skipped(view),
        ],
        "Nothing was seen of gradients or updates in this run.",
    )


def norm(view: View) -> Block | None:
    """Before and after clipping, with the limit of clipping."""
    chart = view.chart(NORM, APPLIED, title="gradient norm")
    for name, what, dash in ((NORM, "before clipping", "solid"), (APPLIED, "as the optimizer used it", "dot")):
        series = view.series(name)
        if series is None:
            continue
        view.repeats(chart, name)
        for i in range(min(len(series.cells), 4)):
            who = f"{series.cells.label(i)}, " if len(series.cells) > 1 else ""
            colour = view.colour(2 * i + (name == APPLIED))
            column = series.values[:, i], series.seen[:, i]
            chart.line(who + what, series.steps, *column, colour=colour, dash=dash, markers=name == APPLIED)
    if chart.empty:
        return None
    view.dress(chart, NORM, APPLIED)
    text = ""
    if view.log.run.clip is not None:
        kind, at = view.log.run.clip
        text = f"Gradients are clipped by {kind} at {at:g}."
    rate = view.series(CLIPPED)
    if rate is not None:
        last = rate.worst().compressed()
        if last.size:
            text += f" At the last sample {float(last[-1]):.0%} of the last 30 sampled steps had been clipped."
    return figure("gradient-norm", "Gradient norm before and after clipping", chart.figure(), text.strip())


def second_moment(view: View) -> Block | None:
    """RMS_t of the sentinels at every step, otherwise of all parameters at samples."""
    name = SENTINEL if view.series(SENTINEL) is not None else RMS_T
    return view.lines(
        "rms-t",
        "Gradients in units of the second moment (RMS_t)",
        name,
        note="About 1 while the second moment keeps up. Values above 2.3 have come 1 to 8 steps before loss spikes.",
    )


def ratio(view: View) -> Block | None:
    """Median and spread of the update-to-weight ratio inside of its usual band."""
    series = view.series(RATIO)
    if series is None:
        return None
    chart = _spread(view, series, "update / weights")
    _shade(view, chart.shapes, *USUAL_RATIO, view.colours.healthy)
    text = "Root of the summed squares of one update over that of the weights. Green: from 1e-4 to 0.1, as is usual."
    return figure("update-ratio", "Size of an update against the weights", chart.figure(), text)


def _spread(view: View, series: Series, title: str) -> Chart:
    """Median and range of all tensors, and the three worst of them."""
    chart = view.chart(series.signal.name, log=True, title=title)
    view.middle(chart, series)
    for k, i in enumerate(view.worst(series, 3)):
        column = series.values[:, i], series.seen[:, i]
        chart.line(labels_of(series)[i], series.steps, *column, colour=view.colour(k))
    view.dress(chart, series.signal.name)
    return chart


def epsilon(view: View) -> Block | None:
    """Gradient RMS against epsilon, with the region in which epsilon rules."""
    series = view.series(EPSILON)
    if series is None:
        return None
    chart = _spread(view, series, "gradient RMS / epsilon")
    floor = min((limit.value for limit in view.limits.get(EPSILON, ())), default=1.0)
    _shade(view, chart.shapes, floor * 1e-3, 1.0, view.colours.warning)
    text = "Below 1 the optimizer's epsilon, and no longer the second moment, sets the size of updates."
    return figure("epsilon", "Distance of gradients from epsilon", chart.figure(), text)


def skipped(view: View) -> Block | None:
    """Updates that did not come; nothing is drawn where all came."""
    series = view.series("optimizer/skipped")
    if series is None or not np.any(np.nan_to_num(series.values[series.seen])):
        return None
    return view.lines("skipped", "Skipped updates", "optimizer/skipped")


def _shade(view: View, shapes: list[dict[str, object]], low: float, high: float, colour: str) -> None:
    shapes.append(
        {
            "type": "rect",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": low,
            "y1": high,
            "layer": "below",
            "line": {"width": 0},
            "fillcolor": dimmed(colour, 0.07),
        }
    )
