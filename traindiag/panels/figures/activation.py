"""The activation panel: does the residual stream grow, over depth or over time, and are units dead?"""

from __future__ import annotations

import numpy as np

from traindiag.alerts.text import number
from traindiag.panels.figures.chart import Chart
from traindiag.panels.figures.content import Block, figure
from traindiag.panels.figures.style import SCALES, axis
from traindiag.panels.figures.text import short_names, shown
from traindiag.panels.figures.view import View, axis_title, present, wide

RMS = "activation/rms"
PROFILES = 6


def activation_blocks(view: View) -> list[Block]:
    zeros = view.series("activation/zero_fraction")
    bad = view.series("activation/nonfinite")
    return present(
        [
            view.by_place("rms-over-steps", "Size of the residual stream over time", RMS),
            depth(view),
            view.lines("growth-exponent", "Growth over depth", "activation/growth_exponent"),
            view.lines("max", "Largest activations", "activation/max"),
            view.lines("kurtosis", "Outlier features", "activation/kurtosis"),
            view.lines("zeros", "Share of values that are zero: dead units", "activation/zero_fraction", log=False)
            if zeros is not None and np.nanmax(np.where(zeros.seen, zeros.values, 0)) > 0
            else None,
            view.lines("nonfinite", "Values that are NaN or infinite", "activation/nonfinite")
            if bad is not None and np.any(bad.values[bad.seen] != 0)
            else None,
        ],
        "Nothing was seen of activations in this run.",
    )


def depth(view: View) -> Block | None:
    """The RMS layer by layer, at some steps from the first to the last."""
    series = view.series(RMS)
    if series is None or len(series.cells) < 2:
        return None
    names = [shown(n) for n in short_names(list(series.cells.labels))]
    chart = Chart(view.colours, axis_title(series), log=wide([series]))
    rows = [int(r) for r in np.unique(np.linspace(0, len(series) - 1, PROFILES).round())]
    scale = SCALES["size"]
    first, last_stop = (3, 9) if view.theme == "dark" else (0, 8)  # what can be told from the background
    for k, row in enumerate(rows):
        seen = series.seen[row]
        if not seen.any():
            continue
        colour = scale[first + round(k / max(1, len(rows) - 1) * (last_stop - first))][1]
        step = int(series.steps[row])
        chart.line(f"step {step}", np.flatnonzero(seen), series.values[row][seen], colour=colour, markers=True)
        chart.traces[-1]["hovertemplate"] = "%{text}<br>%{fullData.name}: %{y:.4g}<extra></extra>"
        chart.traces[-1]["text"] = [shown(series.cells.label(int(i))) for i in chart.traces[-1]["x"]]
    if chart.empty:
        return None
    figured = chart.figure()
    every = max(1, -(-len(names) // 16))
    ticks = list(range(0, len(names), every))
    figured["layout"]["xaxis"] = axis(
        view.colours, "layer, from input to output", tickvals=ticks, ticktext=[names[i] for i in ticks]
    )
    last = float(np.nan_to_num(series.values[-1][series.seen[-1]], posinf=0, neginf=0).max(initial=0.0))
    text = f"Root mean square of what each block returns; at most {number(last)} at the last sample."
    return figure("rms-over-depth", "Size of the residual stream over depth", figured, text)
