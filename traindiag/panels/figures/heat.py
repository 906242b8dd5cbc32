"""Heat maps: places over steps, and layer by head at one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from traindiag.alerts.text import number
from traindiag.panels.figures.chart import log_ticks
from traindiag.panels.figures.content import Figure
from traindiag.panels.figures.numbers import Columns, Floats, kind_of, listed
from traindiag.panels.figures.style import SCALES, Palette, axis, layout
from traindiag.panels.figures.text import short_names, shown
from traindiag.record.series import Series

MAX_COLUMNS = 160
"""Columns of steps; more would be narrower than four pixels."""
MAX_ROWS = 96
"""Rows that can still be told apart; more are gathered by layer."""
WIDE = 12.0
"""A range of values by this factor or more is drawn on a logarithmic scale."""


def over_steps(
    series: Series,
    rows: Sequence[tuple[str, Sequence[int]]],
    colours: Palette,
    *,
    scale: str = "size",
    title: str = "",
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """Rows of cells over steps, each with its worst value.

    Args:
        series: The values.
        rows: Name and columns of the series for each row, from top to bottom.
        colours: Of the theme.
        scale: What the colours mean.
        title: Of the colours, with the unit.
        bounds: Ends of the colours, by default those of the values.
    """
    columns = Columns(series.steps, MAX_COLUMNS)
    values, bad = columns.worst(series.values, series.seen, series.signal.worst)
    pick = np.fmax if series.signal.worst == "max" else np.fmin
    count = len(columns.starts)
    grid = np.full((len(rows), count), np.nan)
    none = np.zeros((len(rows), count))
    for i, (_, cells) in enumerate(rows):
        for cell in cells:
            grid[i] = pick(grid[i], values[:, cell])
            none[i] = np.where(bad[:, cell] != 0, bad[:, cell], none[i])
    names = [shown(name) for name, _ in rows]
    height = int(np.clip(18 * len(rows) + 110, 190, 620))
    figure = _heat(
        grid,
        none,
        columns.first.tolist(),
        names,
        names,
        colours,
        scale,
        title,
        bounds,
        height,
        words="step %{x}" if columns.whole else "worst of the samples from step %{x} on",
    )
    laid = figure["layout"]
    laid["xaxis"] |= {
        "title": {**laid["xaxis"]["title"], "text": "step"},
        "type": "linear",
        "tickformat": "~s" if columns.last[-1:].max(initial=0) >= 100_000 else "d",
    }
    return figure


def layer_by_head(
    series: Series,
    row: int,
    colours: Palette,
    *,
    scale: str = "size",
    title: str = "",
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """Layers, bottom to top, by heads at one sample; of a series with a single axis one column."""
    layers, heads = _places(series)
    names = [str(n) for n in layers]
    grid, bad = slice_of(series, row)
    height = int(np.clip(20 * len(layers) + 110, 220, 520))
    figure = _heat(
        grid,
        bad,
        [str(h) for h in heads],
        [shown(n) for n in short_names(names)],
        [shown(n) for n in names],
        colours,
        scale,
        title,
        bounds,
        height,
        words="head %{x}",
        number=len(layers) * len(heads) <= 64,
    )
    laid = figure["layout"]
    laid["xaxis"] |= {"title": {**laid["xaxis"]["title"], "text": "head"}, "tickvals": None, "ticktext": None}
    every = max(1, len(heads) // 16)
    laid["xaxis"] |= {"tickvals": list(range(0, len(heads), every)), "ticktext": [shown(h) for h in heads[::every]]}
    return figure


def slice_of(series: Series, row: int) -> tuple[Floats, Floats]:
    """Values ``[layers, heads]`` of one sample, NaN where there is none, and what is not finite of it, else 0."""
    layers, heads = _places(series)
    where = {c: i for i, c in enumerate(layers)}, {c: i for i, c in enumerate(heads)}
    grid, bad = np.full((len(layers), len(heads)), np.nan), np.zeros((len(layers), len(heads)))
    values, seen = series.values[row], series.seen[row]
    for i, place in enumerate(series.cells.coordinates):
        if not seen[i]:
            continue
        at = where[0][place[0]], where[1][place[1]] if len(place) > 1 else 0
        if np.isfinite(values[i]):
            grid[at] = values[i]
        else:
            bad[at] = values[i]
    return grid, bad


def bounds_of(series: Series) -> tuple[float, float] | None:
    """Smallest and largest finite value of all samples: colours mean the same at every step."""
    good = series.values[series.seen & np.isfinite(series.values)]
    return (float(good.min()), float(good.max())) if good.size else None


def _places(series: Series) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    axes = series.cells.axes
    return series.axis(axes[0]), series.axis(axes[1]) if len(axes) > 1 else ("",)


def _heat(
    grid: Floats,
    bad: Floats,
    columns: Sequence[str | int],
    rows: Sequence[str],
    full: Sequence[str],
    colours: Palette,
    scale: str,
    title: str,
    bounds: tuple[float, float] | None,
    height: int,
    *,
    words: str = "step %{x}",
    number: bool = False,
) -> Figure:
    good = grid[np.isfinite(grid)]
    low, high = bounds if bounds is not None else (float(good.min()), float(good.max())) if good.size else (0.0, 1.0)
    positive = good.size == 0 or float(good[good > 0].min(initial=np.inf)) < np.inf
    log = low >= 0 and high > 0 and positive and high / max(low, high * 1e-12) >= WIDE and scale != "share"
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(np.where(grid > 0, grid, np.nan)) if log else grid
    if log:
        floor = float(np.nanmin(z)) if np.isfinite(z).any() else 0.0
        floor = max(min(floor, np.log10(low) if low > 0 else floor), np.log10(high) - 12)
        z = np.where(
            grid == 0, floor, np.maximum(z, floor)
        )  # zeros, and what is next to none, at the end of the scale
        low, high = floor, float(np.log10(high))
    if high <= low:
        low, high = low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": listed(z),
        "x": list(columns),
        "y": list(full),
        "text": [[_number(v) for v in line] for line in grid.tolist()],
        "colorscale": SCALES[scale],
        "zmin": round(low, 6),
        "zmax": round(high, 6),
        "xgap": 1 if isinstance(columns[0] if columns else "", str) else 0,
        "ygap": 1 if len(rows) <= 30 else 0,
        "hoverongaps": False,
        "hovertemplate": "%{y}<br>" + words + ": %{text}<extra></extra>",
        "colorbar": _colourbar(colours, title, low, high, log),
    }
    if number:
        trace |= {"texttemplate": "%{text}", "textfont": {"size": 11}}
    data = [trace]
    if (bad != 0).any():
        marks = bad != 0
        data.append(
            {
                "type": "heatmap",
                "name": "no number",
                "z": listed(np.where(marks, 1.0, np.nan)),
                "x": trace["x"],
                "y": trace["y"],
                "text": [[kind_of(v) if v != 0 else "" for v in line] for line in bad.tolist()],
                "colorscale": [[0, colours.nonfinite], [1, colours.nonfinite]],
                "zmin": 0,
                "zmax": 1,
                "showscale": False,
                "hoverongaps": False,
                "hovertemplate": "%{y}<br>" + words + ": %{text}<extra></extra>",
                **({"texttemplate": "%{text}", "textfont": {"size": 11, "color": "#ffffff"}} if number else {}),
            }
        )
    every = max(1, -(-len(rows) // 28))
    ticks = list(range(0, len(rows), every))
    laid = layout(
        colours,
        height,
        xaxis=axis(colours, "", showgrid=False, type="category"),
        yaxis=axis(
            colours,
            "",
            showgrid=False,
            type="category",
            tickvals=ticks,
            ticktext=[rows[i] for i in ticks],
            ticksuffix=" ",
        ),
        showlegend=False,
    )
    laid["plot_bgcolor"] = colours.empty
    laid["margin"] |= {"t": 14, "r": 10}
    return {"data": data, "layout": laid}


def _colourbar(colours: Palette, title: str, low: float, high: float, log: bool) -> dict[str, Any]:
    bar: dict[str, Any] = {
        "title": {"text": shown(title), "side": "right", "font": {"size": 11, "color": colours.faint}},
        "thickness": 12,
        "outlinewidth": 0,
        "tickfont": {"size": 11, "color": colours.faint},
        "len": 1,
        "xpad": 8,
    }
    if log:
        ticks = log_ticks(low, high)
        bar |= ticks | {"tickvals": [round(float(np.log10(v)), 6) for v in ticks["tickvals"]]}
    return bar


def _number(value: float) -> str:
    return number(value) if np.isfinite(value) else ""
