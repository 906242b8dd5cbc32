"""The panel of the stability gap: what happens to old tasks when training turns to something else?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from traindiag.alerts.text import number
from traindiag.panels.figures.chart import Chart
from traindiag.panels.figures.content import Block, figure
from traindiag.panels.figures.text import shown
from traindiag.panels.figures.view import View, labels_of, metric, present
from traindiag.record.cells import Coordinates
from traindiag.record.frame import FloatArray
from traindiag.record.series import Series

_S = "stability/"
MOST_GAPS = 4
"""Gaps that are marked with their depth, the deepest; more would lie over each other."""
SHALLOW = 0.1
"""Share of the deepest gap below which one is not marked."""
CLOSED = 0.95
"""Share of a gap from which on it counts as closed."""


def stability_blocks(view: View) -> list[Block]:
    blocks = [
        tasks(view, _S + "value", "Old tasks: the metric while training goes on"),
        tasks(view, _S + "loss", "Old tasks: the loss while training goes on"),
        view.lines("gap-depth", "Depth of the gap", _S + "gap_depth"),
        view.lines("residual", "What is left of the gap", _S + "gap_residual"),
        view.lines("recovered", "Share of the gap that has closed again", _S + "recovered", log=False),
        view.together(
            "accuracies",
            "Worst case over all tasks",
            ((_S + "min_acc", "min-ACC", "solid"), (_S + "wc_acc", "WC-ACC", "dash")),
            "metric",
            "min-ACC: the worst value of each old task since it was learned. WC-ACC: the present task, and these.",
        ),
        view.together(
            "windowed",
            "Largest change within a window of evaluations",
            (
                (_S + "wf_10", "fall, 10", "solid"),
                (_S + "wf_100", "fall, 100", "dash"),
                (_S + "wp_10", "rise, 10", "dot"),
                (_S + "wp_100", "rise, 100", "dashdot"),
            ),
            "change of the metric",
        ),
        view.together(
            "forgetting",
            "Forgetting and backward transfer",
            ((_S + "forgetting", "forgetting", "solid"), (_S + "backward_transfer", "backward transfer", "dash")),
            "metric",
        ),
        view.lines("gradient-ratio", "Training gradient against that of old tasks", _S + "gradient_ratio"),
        view.lines("gradient-cosine", "Does training pull against old tasks?", _S + "gradient_cosine", log=False),
    ]
    return present(
        blocks + view.others("stability", _SHOWN),
        "Nothing was measured of old tasks in this run: no monitor of the stability gap was on.",
    )


@dataclass(frozen=True)
class Gap:
    """What one shift did to one task.

    Args:
        task: Cell of the task.
        shift: Step of the shift.
        level: The metric before it.
        step: Step at which it was worst.
        value: The metric there.
        closed: Step from which on it was back, None where it never was.
    """

    task: int
    shift: int
    level: float
    step: int
    value: float
    closed: int | None

    @property
    def depth(self) -> float:
        return abs(self.value - self.level)


def tasks(view: View, name: str, title: str) -> Block | None:
    """A line a task, with the shifts, the level before each of them, how deep it fell and when it was back."""
    series = view.series(name)
    if series is None:
        return None
    chart = view.chart(name, title=metric(name), log=False, height=380)
    view.repeats(chart, name)
    labels = labels_of(series)
    for i in range(min(len(series.cells), 8)):
        column = series.values[:, i], series.seen[:, i]
        chart.line(labels[i], series.steps, *column, colour=view.colour(i))
    _mark_shifts(view, chart)
    gaps = sorted(gaps_of(view, series), key=lambda g: -g.depth)
    for gap in [g for g in gaps if g.depth > SHALLOW * gaps[0].depth][:MOST_GAPS]:
        _mark_gap(view, chart, gap, labels[gap.task])
    view.dress(chart, name)
    text = (
        "Upright lines: training became another one. Open circles: the worst value since, with its distance from the "
    )
    text += "level before; a full circle where 95 % of it had closed again."
    drawn = chart.figure()
    if _closer(view, series, drawn["layout"]):
        text += " Shown from before the first shift on; a double click shows the whole run."
    return figure(f"old-tasks-{metric(name)}", title, drawn, text)


def _closer(view: View, series: Series, laid: dict[str, Any]) -> bool:
    """Begins shortly before the first shift: what a run learns at first dwarfs what it loses later."""
    marks = shifts(view)
    last = int(series.steps[-1])
    if not marks or marks[0][0] >= last:
        return False
    first = marks[0][0] - max(20, (last - marks[0][0]) // 3)
    if first <= int(series.steps[0]):
        return False
    rows = series.steps >= first
    values = series.values[rows][series.seen[rows]]
    values = values[np.isfinite(values)]
    if not values.size:
        return False
    low, high = float(values.min()), float(values.max())
    room = 0.12 * (high - low) or 0.05 * max(abs(high), 1e-6)
    laid["xaxis"] |= {"range": [first, last + 0.02 * (last - first)], "rangemode": "normal"}
    laid["yaxis"] |= {"range": [round(low - room, 6), round(high + room, 6)]}
    return True


def shifts(view: View) -> list[tuple[int, str]]:
    """Step and reason of each shift."""
    series = view.series(_S + "shift")
    if series is None:
        return []
    found = []
    for k, step in enumerate(series.steps.tolist()):
        hit = series.seen[k] & (np.nan_to_num(series.values[k]) > 0)
        if hit.any():
            found.append((step, ", ".join(series.cells.label(int(i)) for i in np.flatnonzero(hit))))
    return found


def gaps_of(view: View, series: Series) -> list[Gap]:
    """Every gap that the run's own measures found, from its curve and its level before each shift."""
    level, depth, back = (view.series(_S + n) for n in ("baseline", "gap_depth", "recovered"))
    steps = [step for step, _ in shifts(view)]
    if level is None or depth is None or not steps:
        return []
    down = series.signal.worst == "min"
    found = []
    for first, last in zip(steps, [*steps[1:], view.last_step + 1]):
        for i, place in enumerate(series.cells.coordinates):
            rows = np.flatnonzero((series.steps >= first) & (series.steps < last) & series.seen[:, i])
            before, deep = _at(level, place, first, last), _at(depth, place, first, last)
            if not rows.size or not before.size or not deep.size or not np.nanmax(deep) > 0:
                continue
            values = series.values[rows, i]
            if not np.isfinite(values).any():
                continue
            worst = int(np.nanargmin(values) if down else np.nanargmax(values))
            at = int(series.steps[rows[worst]])
            found.append(Gap(i, first, float(before[-1]), at, float(values[worst]), _closed(back, place, at, last)))
    return found


def _at(series: Series, place: Coordinates, first: int, last: int) -> FloatArray:
    """Values of one cell from one step up to another."""
    at = series.cells.position.get(place)
    if at is None:
        return np.empty(0, np.float32)
    rows = (series.steps >= first) & (series.steps < last) & series.seen[:, at]
    return np.asarray(series.values[rows, at])


def _closed(back: Series | None, place: Coordinates, after: int, last: int) -> int | None:
    at = None if back is None else back.cells.position.get(place)
    if back is None or at is None:
        return None
    rows = (back.steps > after) & (back.steps < last) & back.seen[:, at] & (back.values[:, at] >= CLOSED)
    found = np.flatnonzero(rows)
    return int(back.steps[found[0]]) if found.size else None


def _mark_shifts(view: View, chart: Chart) -> None:
    for step, reason in shifts(view):
        chart.upright(step, view.colours.faint, "dash", 1)
        chart.annotations.append(
            {
                "x": step,
                "y": 1,
                "yref": "paper",
                "text": shown(reason) or "shift",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "top",
                "font": {"size": 11, "color": view.colours.faint},
            }
        )


def _mark_gap(view: View, chart: Chart, gap: Gap, label: str) -> None:
    colour = view.colour(gap.task)
    until = gap.closed if gap.closed is not None else gap.step
    chart.traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [gap.shift, until],
            "y": [gap.level, gap.level],
            "line": {"color": colour, "width": 1, "dash": "dot"},
            "showlegend": False,
            "hoverinfo": "skip",
        }
    )
    ends = [(gap.step, gap.value, "circle-open")]
    if gap.closed is not None:
        ends.append((gap.closed, gap.level, "circle"))
    back = f"back at step {gap.closed}" if gap.closed is not None else "not back by the end of this stretch"
    fall = f"from {number(gap.level)} to {number(gap.value)} at step {gap.step}"
    chart.traces.append(
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": [x for x, _, _ in ends],
            "y": [y for _, y, _ in ends],
            "marker": {"color": colour, "size": 10, "symbol": [s for _, _, s in ends], "line": {"width": 2}},
            "text": [_signed(gap.value - gap.level), ""][: len(ends)],
            "textposition": "bottom center" if gap.value < gap.level else "top center",
            "textfont": {"color": colour, "size": 12},
            "showlegend": False,
            "hovertext": f"{shown(label)}: {fall}; {back}",
            "hoverinfo": "text",
        }
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


_SHOWN = {
    "value", "loss", "gap_depth", "gap_residual", "recovered", "min_acc", "wc_acc", "wf_10", "wf_100", "wp_10",
    "wp_100", "forgetting", "backward_transfer", "gradient_ratio", "gradient_cosine", "shift", "baseline", "noise",
    "start",
}  # fmt: skip
