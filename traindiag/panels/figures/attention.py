"""The attention panel: which heads grow, how far they are from the limits, and what is behind it."""

from __future__ import annotations

from typing import Any

import numpy as np

from traindiag.panels.figures.content import Block, figure
from traindiag.panels.figures.heat import bounds_of, layer_by_head
from traindiag.panels.figures.view import View, axis_title, labels_of, metric, present, sentence
from traindiag.record.series import Series

RANGE, VALUE, BOUND, ENTROPY = (
    "attention/logit_range",
    "attention/max_logit",
    "attention/max_logit_bound",
    "attention/entropy",
)
NORMS = ("attention/query_norm", "attention/key_norm")
SIGNALS = (RANGE, VALUE, BOUND, ENTROPY, *NORMS)

INLINE_STEPS = 24
"""Steps of a slider that travels inside of its figure."""


def attention_blocks(view: View) -> list[Block]:
    return present(
        [
            heads(view),
            view.lines(
                "heads-over-time",
                "The worst heads against the limits",
                RANGE,
                height=340,
                note="Row maximum less row mean of the logits: what softmax feels of them. Grey: all heads.",
            ),
            view.by_place(
                "heads-over-steps",
                "Every head over time",
                RANGE,
                note="The same for all heads; where there are too many for a row each, the worst head of a layer.",
            ),
            value_and_bound(view),
            view.lines(
                "entropy",
                "Entropy of the attention weights",
                ENTROPY,
                log=False,
                note="Towards 0 a head looks at a single token. The sharpest heads; grey: all heads.",
            ),
            norms(view),
        ],
        "Nothing was seen of attention in this run. The coverage in the overview says why, where that is known.",
    )


def heads(view: View) -> Block | None:
    """Layer by head at one step; signal and step can be chosen."""
    there = [name for name in SIGNALS if view.series(name) is not None]
    chosen = view.options.get("signal", RANGE)
    name = chosen if chosen in there else next(iter(there), "")
    series = view.series(name)
    if series is None:
        return None
    row = view.row(series)
    scale = "entropy" if name == ENTROPY else "size"
    bounds = bounds_of(series)
    figured = layer_by_head(series, row, view.colours, scale=scale, title=axis_title(series), bounds=bounds)
    if view.options.get("slider") == "inline":
        _slide(figured, view, series, row, scale, bounds)
    steps = series.steps.tolist()
    controls = [
        {"option": "signal", "label": "signal", "kind": "select", "values": there, "value": name},
        {"option": "step", "label": "step", "kind": "slider", "values": steps, "value": steps[row]},
    ]
    title = f"Layer by head: {metric(name)} at step {steps[row]}"
    if view.options.get("slider") == "inline":
        title, controls = f"Layer by head: {metric(name)}", []
    return figure("heads", title, figured, sentence(series.signal.summary), controls)


def _slide(
    figured: dict[str, Any], view: View, series: Series, row: int, scale: str, bounds: tuple[float, float] | None
) -> None:
    """Puts a slider into the figure, with the worst sample, the last one and evenly spaced ones."""
    count = len(series)
    extreme = series.extreme()
    kept = {int(i) for i in np.linspace(0, count - 1, min(count, INLINE_STEPS)).round()} | {row}
    if extreme is not None:
        kept.add(int(np.searchsorted(series.steps, extreme.step)))
    if len(kept) < 2:
        return
    rows = sorted(kept)
    built = {r: layer_by_head(series, r, view.colours, scale=scale, bounds=bounds)["data"] for r in rows}
    marked = next((data[1] for data in built.values() if len(data) > 1), None)
    frames, steps = [], []
    for r, data in built.items():
        at = str(int(series.steps[r]))
        parts = [{key: trace[key] for key in ("type", "z", "text")} for trace in data]
        if marked is not None and len(parts) == 1:
            parts.append({"type": "heatmap", "z": [[None]], "text": [[""]]})
        frames.append({"name": at, "data": parts})
        options = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
        steps.append({"label": at, "method": "animate", "args": [[at], options]})
    if marked is not None and len(figured["data"]) == 1:
        figured["data"].append(marked | {"z": [[None]], "text": [[""]]})
    figured["frames"] = frames
    figured["layout"]["sliders"] = [
        {
            "active": rows.index(row),
            "currentvalue": {"prefix": "step ", "font": {"size": 12, "color": view.colours.text}},
            "pad": {"t": 38, "b": 4},
            "len": 1,
            "steps": steps,
            "font": {"size": 10, "color": view.colours.faint},
            "bgcolor": view.colours.grid,
            "bordercolor": view.colours.grid,
            "activebgcolor": view.colours.info,
            "tickcolor": view.colours.grid,
        }
    ]
    figured["layout"]["height"] += 90
    figured["layout"]["margin"]["b"] = 60


def value_and_bound(view: View) -> Block | None:
    """The largest logit found and what it cannot exceed."""
    value, bound = view.series(VALUE), view.series(BOUND)
    if value is None:
        return view.lines("value-and-bound", "What the largest logit cannot exceed", BOUND)
    chart = view.chart(VALUE, log=_spread(value))
    picked = view.worst(value, 3)
    labels = labels_of(value)
    view.repeats(chart, VALUE)
    for k, i in enumerate(picked):
        if bound is not None and (at := bound.cells.position.get(value.cells.coordinates[i])) is not None:
            chart.line(
                f"bound of {labels[i]}",
                bound.steps,
                bound.values[:, at],
                bound.seen[:, at],
                colour=view.colour(k),
                dash="dot",
                width=1.3,
                legend=False,
                markers=False,
            )
        chart.line(labels[i], value.steps, value.values[:, i], value.seen[:, i], colour=view.colour(k))
    view.dress(chart, VALUE, BOUND)
    text = "Solid: the largest logit that occurred in the rows observed. Dotted: what no row can exceed."
    return figure("value-and-bound", "The largest logit and its bound", chart.figure(), text)


def norms(view: View) -> Block | None:
    """Query and key norms of the heads whose logits are worst."""
    lead = view.series(RANGE) or view.series(VALUE) or view.series(NORMS[0])
    if lead is None or all(view.series(n) is None for n in NORMS):
        return None
    picked = [(lead.cells.coordinates[i], labels_of(lead)[i]) for i in view.worst(lead, 3)]
    chart = view.chart(*NORMS, title="norm")
    for name, dash, what in zip(NORMS, ("solid", "dash"), ("query", "key")):
        series = view.series(name)
        for k, (place, label) in enumerate(picked if series is not None else ()):
            assert series is not None
            at = series.cells.position.get(place)
            if at is not None:
                chart.line(
                    f"{what}, {label}",
                    series.steps,
                    series.values[:, at],
                    series.seen[:, at],
                    colour=view.colour(k),
                    dash=dash,
                )
    if chart.empty:
        return None
    view.dress(chart, *NORMS)
    text = "Root mean square over tokens. Logits grow with the product of both; these are the heads where they did."
    return figure("query-key-norms", "Query and key norms", chart.figure(), text)


def _spread(series: Series) -> bool:
    """Raw logits may be negative; a logarithmic axis serves where the drawn ones are not and grow by far."""
    top = series.worst().compressed()
    good = top[np.isfinite(top)]
    return bool(good.size and good.min() > 0 and good.max() / good.min() >= 20)
