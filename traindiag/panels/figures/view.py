"""What a panel builds from: one run, what was chosen, and the pieces that all panels share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from traindiag.alerts.limits import Limit, default_limits
from traindiag.panels.figures.chart import Chart
from traindiag.panels.figures.content import Block, figure, note
from traindiag.panels.figures.events import Event, about, events_of
from traindiag.panels.figures.heat import MAX_ROWS, over_steps
from traindiag.panels.figures.numbers import Floats
from traindiag.panels.figures.style import Palette, palette
from traindiag.panels.figures.text import short_names
from traindiag.record.log import LogData
from traindiag.record.series import Series

WORST = 5
"""Cells that are drawn one by one, the worst of them."""
WIDE = 20.0
"""Positive values that span this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class View:
    """One run as a panel sees it.

    Args:
        name: Of the run.
        log: What was recorded.
        theme: ``light`` or ``dark``.
        options: What was chosen; unknown options are none of this panel's.
        limits: By signal; by default those of the default rules.
    """

    name: str
    log: LogData
    theme: str = "light"
    options: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Sequence[Limit]] = field(default_factory=default_limits)

    @cached_property
    def colours(self) -> Palette:
        return palette(self.theme)

    @cached_property
    def _events(self) -> tuple[list[Event], list[str]]:
        return events_of(self.log.alerts)

    @property
    def events(self) -> list[Event]:
        """In the order in which they were opened."""
        return self._events[0]

    @property
    def problems(self) -> list[str]:
        """What could not be read."""
        return [*self.log.problems, *self._events[1]]

    @cached_property
    def families(self) -> dict[str, list[str]]:
        """Signals with a value, by family."""
        found: dict[str, list[str]] = {}
        for name in self.log.history:
            if self.series(name) is not None:
                found.setdefault(name.split("/", 1)[0], []).append(name)
        return found

    def series(self, name: str) -> Series | None:
        """A signal, if any of it was seen."""
        series = self.log.history.get(name)
        return series if series is not None and len(series) and series.seen.any() else None

    @cached_property
    def jobs(self) -> list[int]:
        """Steps at which later jobs of the run went on."""
        starts: dict[int, int] = {}
        for series in self.log.history.values():
            segments = series.segments
            for at in np.flatnonzero(np.diff(segments)) + 1:
                segment, step = int(segments[at]), int(series.steps[at])
                starts[segment] = min(step, starts.get(segment, step))
        return sorted(starts.values())

    @cached_property
    def last_step(self) -> int:
        """The last step with a value, -1 where there is none."""
        return max((int(s.steps[-1]) for s in self.log.history.values() if len(s)), default=-1)

    @cached_property
    def first_step(self) -> int:
        """The first step with a value, -1 where there is none."""
        return min((int(s.steps[0]) for s in self.log.history.values() if len(s)), default=-1)

    def row(self, series: Series) -> int:
        """The sample nearest to the step that was chosen, by default the last."""
        steps = series.steps
        try:
            wanted = int(float(self.options["step"]))
        except (KeyError, ValueError, OverflowError):
            return len(steps) - 1
        at = int(np.searchsorted(steps, wanted))
        return at - 1 if at == len(steps) or (at and wanted - steps[at - 1] <= steps[at] - wanted) else at

    def cell(self, series: Series) -> int | None:
        """The cell that was chosen, by its label or by the beginning of it."""
        wanted = self.options.get("cell", "")
        if not wanted:
            return None
        labels = series.cells.labels
        exact = next((i for i, label in enumerate(labels) if label == wanted), None)
        return exact if exact is not None else next((i for i, t in enumerate(labels) if t.startswith(wanted)), None)

    def chart(self, *signals: str, title: str | None = None, log: bool | None = None, height: int = 300) -> Chart:
        """An empty chart for signals, with a title from the first one."""
        known = [s for s in map(self.series, signals) if s is not None]
        if title is None:
            title = axis_title(known[0]) if known else ""
        return Chart(self.colours, title, log=wide(known) if log is None else log, height=height)

    def dress(self, chart: Chart, *signals: str, limits: bool = True, events: bool = True) -> None:
        """Adds what belongs to the signals: limits, alerts, forecasts and the jobs of the run."""
        concerned = about(self.events, *signals)
        if limits:
            chart.limits([limit for name in signals for limit in self.limits.get(name, ())])
        if events:
            for event in concerned:
                chart.forecast(event)
            chart.events(concerned)
        chart.jobs(self.jobs)

    def repeats(self, chart: Chart, name: str, pick: Callable[[Series], Floats] | None = None) -> None:
        """What earlier jobs had measured of steps that were gone through again, in grey."""
        first = True
        for history in self.log.repeated:
            if name not in history:
                continue
            series = history[name]
            values = series.worst() if pick is None else pick(series)
            data = np.asarray(np.ma.getdata(values))
            seen = ~np.ma.getmaskarray(values)
            chart.line(
                "gone through again",
                series.steps,
                data,
                seen,
                colour=self.colours.faint,
                dash="dot",
                width=1.4,
                legend=first,
                markers=False,
            )
            first = False

    def lines(
        self,
        id: str,
        title: str,
        name: str,
        *,
        note: str = "",
        log: bool | None = None,
        height: int = 300,
        only: Sequence[int] | None = None,
    ) -> Block | None:
        """The worst cells of one signal over steps, with its median where there are many."""
        series = self.series(name)
        if series is None:
            return None
        chart = self.chart(name, log=log, height=height)
        picked = list(only) if only is not None else self.worst(series)
        labels = labels_of(series)
        self.repeats(chart, name)
        if len(series.cells) > len(picked):
            self.middle(chart, series)
        for k, i in enumerate(picked):
            label = labels[i] or metric(name)
            column = series.values[:, i], series.seen[:, i]
            chart.line(label, series.steps, *column, colour=self.colour(k))
        self.dress(chart, name)
        return figure(id, title, chart.figure(), note or sentence(series.signal.summary))

    def together(
        self,
        id: str,
        title: str,
        signals: Sequence[tuple[str, str, str]],
        unit: str,
        note: str = "",
        *,
        log: bool | None = False,
    ) -> Block | None:
        """Several signals, each ``(name, label, dash)``, in one chart: colour tells them apart, and cells by name.

        With more than one cell the colour tells the cell, and the dash the signal.
        """
        found = [(s, label, dash) for name, label, dash in signals if (s := self.series(name)) is not None]
        if not found:
            return None
        chart = self.chart(*(s.signal.name for s, _, _ in found), title=unit, log=log)
        several = max(len(s.cells) for s, _, _ in found) > 1
        places: dict[str, int] = {}
        for k, (series, label, dash) in enumerate(found):
            self.repeats(chart, series.signal.name)
            for i in self.worst(series, 4):
                where = labels_of(series)[i]
                colour = places.setdefault(where, len(places)) if several else k
                column = series.values[:, i], series.seen[:, i]
                said = f"{where}, {label}" if several and len(found) > 1 else where if several else label
                chart.line(said, series.steps, *column, colour=self.colour(colour), dash=dash)
        self.dress(chart, *(s.signal.name for s, _, _ in found))
        return figure(id, title, chart.figure(), note)

    def middle(self, chart: Chart, series: Series) -> None:
        """Median of all cells and the band from the smallest to the largest."""
        masked = np.ma.MaskedArray(series.values, ~(series.seen & np.isfinite(series.values)))
        steps, filled = series.steps, masked.filled(np.nan)
        rows = ~np.isnan(filled).all(axis=1)
        if not rows.any():
            return
        kept = filled[rows]
        chart.band("all", steps[rows], np.nanmin(kept, axis=1), np.nanmax(kept, axis=1), self.colours.faint)
        chart.line(
            "median",
            steps[rows],
            np.nanmedian(kept, axis=1),
            colour=self.colours.faint,
            dash="dash",
            width=1.4,
            markers=False,
        )

    def worst(self, series: Series, most: int = WORST) -> list[int]:
        """Cells by their worst value of all samples, non-finite ones first; the one that was chosen in front."""
        n = len(series.cells)
        values, seen = series.values, series.seen
        there = seen & np.isfinite(values)
        up = series.signal.worst == "max"
        reached = np.where(there, values, -np.inf if up else np.inf)
        score = reached.max(axis=0) if up else -reached.min(axis=0)
        score = np.where((seen & ~there).any(axis=0), np.inf, score)
        order = [int(i) for i in np.argsort(-score, kind="stable") if seen[:, i].any()][: min(n, most)]
        chosen = self.cell(series)
        return order if chosen is None else [chosen, *(i for i in order if i != chosen)][:most]

    def colour(self, k: int) -> str:
        return self.colours.series[k % len(self.colours.series)]

    def others(self, family: str, shown: Collection[str]) -> list[Block | None]:
        """Lines of the signals of a family that no other block shows, such as those of a newer version."""
        names = [n for n in self.families.get(family, ()) if n.removeprefix(f"{family}/") not in shown]
        return [self.lines(n.replace("/", "-"), metric(n).capitalize(), n) for n in names]

    def by_place(self, id: str, title: str, name: str, *, note: str = "", scale: str = "size") -> Block | None:
        """One signal as a heat map of its cells over steps."""
        series = self.series(name)
        if series is None:
            return None
        bounds = (0.0, 1.0) if scale == "share" else None
        rows, name = rows_of(series), axis_title(series)
        figured = over_steps(series, rows, self.colours, scale=scale, title=name, bounds=bounds)
        return figure(id, title, figured, note or sentence(series.signal.summary))


def labels_of(series: Series) -> list[str]:
    """Short names of all cells: without what they have in common, and without axes of a single place.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.cells import Cells
        >>> cells = Cells(("layer", "head"), (("model.blocks.0.attention", 0), ("model.blocks.1.attention", 0)))
        >>> labels_of(Series(BY_NAME["attention/entropy"], cells))
        ['blocks.0', 'blocks.1']
    """
    axes, coordinates = series.cells.axes, series.cells.coordinates
    parts: list[list[str]] = [[] for _ in coordinates]
    for i, axis in enumerate(axes):
        places = list(dict.fromkeys(c[i] for c in coordinates))
        if len(places) < 2 and len(axes) > 1:
            continue
        words = [f"{axis} {at}" if isinstance(at, int) else str(at) for at in places]
        short = dict(zip(places, short_names(words)))
        for part, c in zip(parts, coordinates):
            part.append(short[c[i]])
    named = [" ".join(part) or series.cells.label(k) for k, part in enumerate(parts)]
    return named if len(set(named)) == len(named) else list(series.cells.labels)


def rows_of(series: Series) -> list[tuple[str, list[int]]]:
    """Cells as rows of a heat map: one each where they can be told apart, else gathered by layer or block."""
    labels = labels_of(series)
    if len(labels) <= MAX_ROWS:
        order = sorted(range(len(labels)), key=lambda k: natural(labels[k])) if "head" in series.cells.axes else None
        return [(labels[k], [k]) for k in (order if order is not None else range(len(labels)))]
    axes, coordinates = series.cells.axes, series.cells.coordinates
    at = next((i for i in range(len(axes)) if len({c[i] for c in coordinates}) > 1), 0)
    rows: dict[str, list[int]] = {}
    for k, c in enumerate(coordinates):
        name = block_of(str(c[at])) if axes[at] == "parameter" else str(c[at])
        rows.setdefault(name, []).append(k)
    return [(short, cells) for short, cells in zip(short_names(list(rows)), rows.values())]


def block_of(parameter: str) -> str:
    """The numbered block that a parameter lies in, or the module that has it.

    Example:
        >>> block_of("model.blocks.3.mlp.0.weight"), block_of("model.head.weight")
        ('model.blocks.3', 'model.head')
    """
    parts = parameter.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1] if at is not None else parts[:-1] or parts)


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts 10 after 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text)]


_TITLES = {
    "attention/logit_range": "row maximum less row mean",
    "attention/max_logit": "largest logit",
    "attention/max_logit_bound": "bound of the largest logit",
    "output/target_z_score": "target's distance (SD)",
    "gradient/block_norm": "gradient norm",
    "gradient/parameter_norm": "gradient norm",
    "optimizer/sentinel_rms_t": "RMS_t",
    "optimizer/rms_t": "RMS_t",
    "optimizer/update_ratio": "update / weights",
    "optimizer/grad_rms_over_eps": "gradient RMS / epsilon",
    "activation/rms": "root mean square",
    "activation/max": "largest |x|",
    "activation/growth_exponent": "exponent a block",
    "loss/value": "training loss",
    "plasticity/q_bound_ratio": "largest |Q| / largest possible return",
    "output/log_z": "log Z",
    "output/z_loss": "(log Z)^2",
    "gradient/norm": "gradient norm",
}


def axis_title(series: Series) -> str:
    """The metric in words, with its unit.

    Example:
        >>> from traindiag.record.cells import Cells
        >>> from traindiag.record.catalogue import BY_NAME
        >>> axis_title(Series(BY_NAME["attention/entropy"], Cells.single()))
        'entropy (nat)'
    """
    unit = series.signal.unit
    return _TITLES.get(series.signal.name, metric(series.signal.name)) + ("" if unit == "1" else f" ({unit})")


def sentence(text: str) -> str:
    """A summary with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".") if text else ""


def metric(name: str) -> str:
    """The part of a name behind its family, as words."""
    return name.split("/", 1)[-1].replace("_", " ")


def wide(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis serves: all values are positive by definition, and they span orders of magnitude."""
    if not series or not all(s.signal.positive for s in series):
        return False
    good = np.concatenate([s.values[s.seen & np.isfinite(s.values) & (s.values > 0)] for s in series])
    return bool(good.size and good.max() / good.min() >= WIDE)


def present(blocks: Sequence[Block | None], otherwise: str) -> list[Block]:
    """Those that there are, or a word on why there are none."""
    found = [b for b in blocks if b is not None]
    return found or [note(otherwise)]
