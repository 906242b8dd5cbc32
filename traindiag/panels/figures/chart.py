"""A line chart over steps: lines, limits, forecasts, alerts, resumed jobs, and marks where a value is no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from traindiag.alerts.limits import Limit
from traindiag.alerts.text import number
from traindiag.panels.figures.content import Figure
from traindiag.panels.figures.events import Event
from traindiag.panels.figures.numbers import Bools, Floats, Ints, envelope, kind_of, listed, stretches
from traindiag.panels.figures.style import SYMBOLS, Palette, axis, layout
from traindiag.panels.figures.text import shown

BINS = 500
"""Stretches of a long line, each drawn by its smallest and largest value: more than a screen has pixels to tell."""
MAX_MARKS = 40
"""Marks of one kind; what comes in thousands is told by its first and by their number."""
NEAR = 30.0
"""A limit this many times beyond the values is named at the edge; drawn in place it would flatten them."""


def dimmed(colour: str, alpha: float) -> str:
    """A colour of the form ``#rrggbb`` as it looks through.

    Example:
        >>> dimmed("#ff0000", 0.2)
        'rgba(255,0,0,0.2)'
    """
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha:g})"


def log_ticks(low: float, high: float, most: int = 7) -> dict[str, Any]:
    """Ticks between two powers of ten, at 1, 2 and 5 where there are few powers, named as people write numbers.

    Example:
        >>> log_ticks(0.5, 4.2)["ticktext"], log_ticks(1.9, 2.8)["ticktext"]
        (['10', '100', '1e3', '1e4'], ['100', '200', '500'])
    """
    decades = np.arange(np.floor(low), np.ceil(high) + 1)
    found = [d + np.log10(m) for d in decades for m in ((1, 2, 5) if high - low < 2 else (1,))]
    ticks = [t for t in found if low - 1e-9 <= t <= high + 1e-9]
    ticks = ticks[:: max(1, -(-len(ticks) // most))]
    values = [float(f"{10.0**t:.3g}") for t in ticks]
    return {"tickmode": "array", "tickvals": values, "ticktext": [number(v) for v in values]}


class Chart:
    """Collects what is drawn.

    Args:
        colours: Of the theme.
        title: Of the value axis, with its unit.
        log: Whether the value axis is logarithmic; what is not positive is then marked at the edge.
        height: In pixels.
    """

    def __init__(self, colours: Palette, title: str, *, log: bool = False, height: int = 300) -> None:
        self.colours, self.title, self.log, self.height = colours, title, log, height
        self.traces: list[dict[str, Any]] = []
        self.shapes: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self._low, self._high = np.inf, -np.inf
        self._limits: list[Limit] = []
        self._marked: set[str] = set()

    @property
    def empty(self) -> bool:
        """Whether no value was drawn or marked."""
        return not self.traces

    def line(
        self,
        name: str,
        steps: Ints,
        values: Floats,
        seen: Bools | None = None,
        *,
        colour: str,
        dash: str = "solid",
        width: float = 1.8,
        legend: bool = True,
        markers: bool | None = None,
    ) -> None:
        """Draws values over steps; what was not seen is passed over, values that are no number are marked."""
        if seen is not None:
            steps, values = steps[seen], values[seen]
        if not len(steps):
            return
        wide = np.asarray(values, np.float64)
        bad = ~np.isfinite(wide)
        under = (wide <= 0) & ~bad if self.log else np.zeros(len(wide), np.bool_)
        drawn = np.where(bad | under, np.nan, wide)
        kept = envelope(drawn, BINS)
        if bad.any() or under.any():  # a gap needs its edges
            edges = [i for a, b in stretches(bad | under)[:MAX_MARKS] for i in (a, b)]
            kept = np.unique(np.append(kept, edges).astype(np.int64))
        good = drawn[np.isfinite(drawn)]
        if good.size:
            self._low, self._high = min(self._low, float(good.min())), max(self._high, float(good.max()))
        few = len(kept) <= 60 if markers is None else markers
        self.traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if few else "lines",
                "name": shown(name),
                "x": steps[kept].tolist(),
                "y": listed(drawn[kept]),
                "line": {"color": colour, "width": width, "dash": dash},
                "marker": {"size": 4},
                "showlegend": legend,
                "connectgaps": False,
                "hovertemplate": "%{fullData.name}<br>step %{x}: %{y:.4g}<extra></extra>",
            }
        )
        self._mark(name, steps, wide, bad, colour)
        self._mark(name, steps, wide, under, colour)

    def band(self, name: str, steps: Ints, low: Floats, high: Floats, colour: str) -> None:
        """Fills between two lines."""
        there = np.isfinite(low) & np.isfinite(high)
        if self.log:
            there &= low > 0
        if not there.any():
            return
        at, below, above = steps[there], low[there], high[there]
        kept = np.unique(np.concatenate([envelope(below, BINS // 2), envelope(above, BINS // 2)]))
        at, below, above = at[kept], below[kept], above[kept]
        self._low, self._high = min(self._low, float(below.min())), max(self._high, float(above.max()))
        self.traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": shown(name),
                "x": [*at.tolist(), *at[::-1].tolist()],
                "y": listed(np.concatenate([below, above[::-1]])),
                "fill": "toself",
                "fillcolor": dimmed(colour, 0.16),
                "line": {"width": 0, "color": dimmed(colour, 0.4)},
                "hoverinfo": "skip",
            }
        )

    def limits(self, limits: Sequence[Limit]) -> None:
        """Lines at which rules speak; drawn when the range of the values is known."""
        self._limits += limits

    def forecast(self, event: Event) -> None:
        """The steps in which a forecast saw its limit crossed, from where it was told."""
        for told in event.forecasts:
            start, value, limit = told.step, told.value, told.limit
            if limit is None or not np.isfinite([value, limit, *told.steps]).all() or told.steps[1] <= 0:
                continue
            if self.log and min(value, limit) <= 0:
                continue
            low, middle, high = told.steps
            colour = self.colours.of(event.severity)
            left = f"{middle:.0f} ({low:.0f}-{high:.0f}) steps"
            self._low, self._high = min(self._low, value, limit), max(self._high, value, limit)
            self.traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"forecast at step {start}",
                    "x": [start, round(start + low, 1), round(start + high, 1), start],
                    "y": listed(np.array([value, limit, limit, value])),
                    "fill": "toself",
                    "fillcolor": dimmed(colour, 0.22),
                    "line": {"width": 1, "dash": "dot", "color": colour},
                    "text": f"told at step {start}: passes {number(limit)} in {left}",
                    "hoverinfo": "text",
                    "hoveron": "fills",
                }
            )

    def events(self, events: Sequence[Event], *, legend: bool = False) -> None:
        """A mark above the chart where each event was told first, and where it became worse."""
        for severity in ("info", "warning", "critical"):
            told = [(step, e) for e in events for step, level in e.levels if level == severity]
            if not told:
                continue
            colour = self.colours.of(severity)
            self.traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": {"info": "note"}.get(severity, severity),
                    "x": [step for step, _ in told],
                    "y": [1.0] * len(told),
                    "yaxis": "y2",
                    "cliponaxis": False,
                    "showlegend": legend,
                    "marker": {"color": colour, "size": 10, "symbol": SYMBOLS[severity]},
                    "text": [shown(e.title) for _, e in told],
                    "customdata": [e.id for _, e in told],
                    "hovertemplate": "%{text}<br>step %{x}<extra></extra>",
                }
            )
            for step, _ in told[:MAX_MARKS] if severity != "info" else ():
                self.upright(step, colour, "dot", 1.2)

    def jobs(self, starts: Sequence[int]) -> None:
        """A line where each later job of the run went on."""
        for step in starts[:MAX_MARKS]:
            self.upright(step, self.colours.faint, "dash", 1)
            self.annotations.append(
                {
                    "x": step,
                    "y": 0,
                    "yref": "paper",
                    "text": "resumed",
                    "showarrow": False,
                    "textangle": -90,
                    "xanchor": "right",
                    "yanchor": "bottom",
                    "font": {"size": 10, "color": self.colours.faint},
                }
            )

    def figure(self, **more: Any) -> Figure:
        """The chart as plotly takes it."""
        self._draw_limits()
        upright: dict[str, Any] = {"type": "log"} if self.log else {}
        if self.log and 0 < self._low < np.inf:
            low, high = np.log10(self._low), np.log10(max(self._high, self._low))
            room = max(0.06 * (high - low), 0.06)
            upright["range"] = [round(float(low - room), 4), round(float(high + room), 4)]
            upright |= log_ticks(float(low), float(high))
        top: dict[str, Any] = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
        laid = layout(
            self.colours,
            self.height,
            xaxis=axis(self.colours, "step", rangemode=self._rangemode, tickformat="~s" if self._long else "d"),
            yaxis=axis(self.colours, shown(self.title), **upright),
            shapes=self.shapes,
            annotations=self.annotations,
            **more,
        )
        if sum(bool(t.get("showlegend", True)) for t in self.traces) < 2:
            laid["showlegend"] = False
            laid["margin"]["t"] = 22
        if any(t.get("yaxis") == "y2" for t in self.traces):
            laid["yaxis2"] = top
        return {"data": self.traces, "layout": laid}

    @property
    def _rangemode(self) -> str:
        """From step 0, unless the log begins so late that its curve would be a stroke."""
        ends = [(min(t["x"]), max(t["x"])) for t in self.traces if t["x"]]
        first, last = min((e[0] for e in ends), default=0), max((e[1] for e in ends), default=0)
        return "tozero" if first <= last / 2 else "normal"

    @property
    def _long(self) -> bool:
        return any(t["x"] and max(t["x"]) >= 100_000 for t in self.traces)

    def upright(self, step: int, colour: str, dash: str, width: float) -> None:
        """A line over the whole height at one step."""
        self.shapes.append(
            {
                "type": "line",
                "x0": step,
                "x1": step,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "layer": "below",
                "line": {"color": colour, "width": width, "dash": dash},
            }
        )

    def _mark(self, name: str, steps: Ints, values: Floats, flags: Bools, colour: str) -> None:
        """A bar along the upper edge over the steps without a number, with what stood there."""
        found = stretches(flags)
        for first, last in found[:MAX_MARKS]:
            value = values[first]
            what = kind_of(float(value)) if not np.isfinite(value) else "0" if value == 0 else "below 0"
            many = "" if first == last else f" for {last - first + 1} samples"
            said = "marked" in self._marked
            self._marked.add("marked")
            self.traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers+text" if first == found[0][0] else "lines+markers",
                    "name": "no number" if not np.isfinite(value) else "not on a logarithmic axis",
                    "legendgroup": "nonfinite",
                    "x": [int(steps[first])] if first == last else [int(steps[first]), int(steps[last])],
                    "y": [0.94] if first == last else [0.94, 0.94],
                    "yaxis": "y2",
                    "text": [what] if first == last else [what, ""],
                    "textposition": "bottom center",
                    "textfont": {"size": 11, "color": self.colours.nonfinite},
                    "line": {"color": self.colours.nonfinite, "width": 3},
                    "marker": {"symbol": "x", "size": 8, "color": self.colours.nonfinite},
                    "showlegend": not said,
                    "hovertext": f"{shown(name)} is {what} at step {int(steps[first])}{many}",
                    "hoverinfo": "text",
                }
            )
        if len(found) > MAX_MARKS:
            self.annotations.append(
                {
                    "x": 1,
                    "y": 1,
                    "xref": "paper",
                    "yref": "paper",
                    "xanchor": "right",
                    "yanchor": "top",
                    "showarrow": False,
                    "text": f"{len(found) - MAX_MARKS} more stretches without a number",
                    "font": {"size": 11, "color": self.colours.nonfinite},
                }
            )

    def _draw_limits(self) -> None:
        for limit in self._limits:
            colour = self.colours.of(limit.severity)
            inside = self._within_reach(limit)
            label = f"limit {number(limit.value)}"
            if not inside:
                edge = {"yref": "paper", "y": 1 if limit.value > self._high else 0}
                edge["yanchor"] = "top" if limit.value > self._high else "bottom"
                self._label(
                    f"{label} lies {'above' if limit.value > self._high else 'below'} this chart", colour, edge
                )
                continue
            self._low, self._high = min(self._low, limit.value), max(self._high, limit.value)
            self.shapes.append(
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": limit.value,
                    "y1": limit.value,
                    "layer": "below",
                    "line": {"color": colour, "width": 1.4, "dash": "dash"},
                }
            )
            at = float(np.log10(limit.value)) if self.log else limit.value
            self._label(label, colour, {"y": at, "yanchor": "bottom" if limit.side == "above" else "top"})

    def _within_reach(self, limit: Limit) -> bool:
        if not np.isfinite(self._low):
            return limit.value > 0 or not self.log
        if self.log:
            far = max(self._high / max(self._low, 1e-300), 10) * NEAR
            return limit.value > 0 and self._low / far <= limit.value <= self._high * far
        reach = max(self._high - self._low, abs(self._high), abs(self._low))
        return self._low - reach <= limit.value <= self._high + reach

    def _label(self, text: str, colour: str, place: dict[str, Any]) -> None:
        self.annotations.append(
            {
                "text": text,
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "showarrow": False,
                "font": {"size": 11, "color": colour},
                "bgcolor": dimmed(self.colours.surface, 0.7),
                "borderpad": 1,
                **place,
            }
        )
