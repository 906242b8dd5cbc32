"""A signal that grows or falls for long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.rules import arguments
from traindiag.rules.baseline import Course, trained_by
from traindiag.rules.cell_table import CellTable, verdict_at
from traindiag.rules.line_fit import Floats, carried_over, robust_spread
from traindiag.rules.rule import COOLDOWN, Direction, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

ROWS = 64
"""Intervals that a window is divided into; each counts as one sample, the mean of what was seen in it."""

SHARE = 0.2
SHORTEST, LONGEST, UNKNOWN = 250, 2000, 1000
"""The window is a fifth of the run within these bounds; the last is for runs of unknown length. In the shortest one
a signal that is sampled every tenth step has 25 samples."""

CLEAR = 6.0
"""Least ratio of a slope to its standard error."""

RELEASE = 0.5
"""Share of the slope's limit (of its logarithm, as slopes are) that a trend must fall below to be over."""

WORDS = {"up": "grows", "down": "falls"}


class Trend(Rule):
    """Speaks while a signal grows, or falls, by more than a factor per 1,000 steps.

    A window of recent steps is divided into 64 intervals, and the logarithm is averaged in each. The slope is the
    median of those between each interval of the older half and its partner in the newer half, so that spikes do not
    turn it. It must stand out of its noise: be at least 6 times its standard error, which is made of the residuals'
    robust deviation and of how much of one is left in the next. Both must hold at ``persistence`` intervals in a row;
    the trend is over when its slope is below half of the limit.

    NaN, infinity and values not above zero have no logarithm and are left out. Samples begin after the learning
    rate's warm-up, and begin anew where it jumps (:data:`~traindiag.rules.baseline.LR_JUMP`). Intervals in which a
    resumed job took steps back are emptied. Growth that sets in is told when it has lasted for some 60 % of the
    window.

    On series without growth (log-normal noise of any size, independent or AR(0.9)) it begins to speak less than once
    in 10,000 steps of a cell for each direction.

    Args:
        signal: Name of a signal with positive values.
        growth_per_1000: Factor per 1,000 steps that is too much, above 1.
        direction: ``up`` for growth, ``down`` for a fall by that factor, or ``both``.
        above: Level that the line through the window must reach, so that growth from nothing is none.
        window: Steps looked back; by default a fifth of the run, at least 250 and at most 2000, and 1000 where the
            run's length is unknown.
        min_samples: Intervals with a value before a cell is judged.
        persistence: Intervals in a row that must show the trend.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique; made of the signal where it is not given.

    Raises:
        ValueError: If an argument is out of its range or the signal does not exist.

    References:
        H. Theil, A rank-invariant method of linear and polynomial regression analysis, 1950 (the incomplete method).

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Trend("reward/kl", growth_per_1000=2.0)
        >>> for step in range(0, 400, 10):
        ...     value = (1 + 0.1 * (step % 20 == 0)) * 3 ** (step / 1000)
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), value)
        ...     verdicts = rule.update(Frame(step, "slow", {"reward/kl": reading}, RunInfo()))
        >>> verdicts[0].evidence
        'reward/kl is 1.53 and grows 3 times per 1,000 steps, by 27 samples of the last 390 steps'
    """

    patient = True  # it looks back over many steps

    def __init__(
        self,
        signal: str,
        *,
        growth_per_1000: float,
        direction: Direction = "up",
        above: float | None = None,
        window: int | None = None,
        min_samples: int = 16,
        persistence: int = 3,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "warning",
        name: str | None = None,
    ) -> None:
        check_signal(signal)
        arguments.above(1.0, growth_per_1000=growth_per_1000)
        arguments.direction(direction)
        arguments.above(0.0, above=above)
        arguments.at_least(ROWS, window=window)
        arguments.at_least(12, min_samples=min_samples)
        if min_samples > ROWS:
            raise ValueError(f"min_samples must be at most {ROWS}, the intervals of a window, got {min_samples}")
        arguments.at_least(1, persistence=persistence)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.signal, self.signals = signal, (signal,)
        self.growth_per_1000, self.direction, self.above, self.window = growth_per_1000, direction, above, window
        self.min_samples, self.persistence, self.cooldown = min_samples, persistence, cooldown
        self.where, self.severity = where, severity
        what = WORDS.get(direction, "drifts")
        self.name = name or f"{signal} {what} {number(growth_per_1000)} times" + (
            "" if where == "*" else f" at {where}"
        )
        self._limit = float(np.log(growth_per_1000))
        # ``side``: 1 while growth is told, -1 while a fall is. ``shown``: intervals in a row that show one, with its
        # sign. ``slope``: of the logarithm per 1,000 steps. ``points``: intervals that it was made of.
        self._table = CellTable(where, sums=(ROWS, 0.0), counts=(ROWS, 0), side=0, shown=0, slope=np.nan, points=0)
        self._intervals = np.full(ROWS, -1)  # number of the interval in each row, counted from step 0; -1: free
        self._width = 0
        self._course = Course()
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(self.signal)
        if reading is None:
            return ()
        table = self._table
        values, seen = table.align(reading)
        judged = seen & (values > 0) & (values < np.inf)
        if not self._turn(frame):
            self._take(values, judged, frame.step)
        return self._tell(frame, reading, values, judged)

    def _width_in(self, run: RunInfo) -> int:
        window = self.window
        if window is None:
            window = UNKNOWN if run.length is None else int(min(max(SHARE * run.length, SHORTEST), LONGEST))
        return max(window // ROWS, 1)

    def _turn(self, frame: Frame) -> bool:
        """Lets go of what is no measure for this frame; whether the frame itself is none."""
        table, turn, width = self._table, self._course.follow(frame), self._width_in(frame.run)
        if turn.back_to is not None:
            self._intervals[(self._intervals + 1) * self._width > turn.back_to] = -1
            table["side"][:] = table["shown"][:] = 0
        if turn.warming or width != self._width:
            self._width, self._intervals[:] = width, -1
            table["side"][:] = table["shown"][:] = 0
        elif turn.jumped:
            assert table.cells is not None
            cells = trained_by(table.cells, turn.jumped)
            table["sums"][:, cells] = table["counts"][:, cells] = 0
            table["side"][cells] = table["shown"][cells] = 0
        return turn.warming

    def _take(self, values: FloatArray, judged: BoolArray, step: int) -> None:
        """Adds a sample; the first one of an interval lets the window be judged."""
        if not judged.any():
            return
        table, interval = self._table, step // self._width
        row = interval % ROWS
        begins = self._intervals[row] != interval
        if begins:
            self._intervals[row], table["sums"][row], table["counts"][row] = interval, 0.0, 0
        table["sums"][row] += np.log(np.where(judged, values, 1.0), dtype=np.float64)
        table["counts"][row] += judged
        if begins:
            self._judge(interval)

    def _judge(self, interval: int) -> None:
        table = self._table
        self._intervals[(self._intervals <= interval - ROWS) | (self._intervals > interval)] = -1
        rows = np.flatnonzero(self._intervals >= 0)
        rows = rows[np.argsort(self._intervals[rows])]
        counts = table["counts"][rows]
        x = (self._intervals[rows] - interval) * self._width / 1000.0
        with np.errstate(invalid="ignore", divide="ignore"):
            y = np.where(counts > 0, table["sums"][rows] / counts, np.nan)
        half = len(rows) // 2
        slopes = (y[half:] - y[: len(rows) - half]) / (x[half:] - x[: len(rows) - half])[:, None] if half else y[:0]
        pairs = np.isfinite(slopes).sum(0)
        table["points"] = points = (counts > 0).sum(0)
        enough = (points >= self.min_samples) & (pairs >= self.min_samples // 2)
        side, was = table["side"], table["shown"]
        shown = np.zeros_like(was)
        for sign in (1, -1):
            # The median is beyond a limit only where half of the slopes are: medians are for the few left over.
            high = enough & (2 * (sign * slopes >= self._limit).sum(0) >= pairs)
            stays = enough & (side == sign) & (2 * (sign * slopes >= RELEASE * self._limit).sum(0) >= pairs)
            side[enough & (side == sign) & ~stays] = 0
            if self.direction == ("down" if sign > 0 else "up"):
                continue
            few = np.flatnonzero(high | stays)
            if few.size:
                table["slope"][few] = slope = np.nanmedian(slopes[:, few], axis=0)
                clear = (sign * slope >= self._limit) & self._is_clear(x, y[:, few], slope)
                shown[few] = np.where(clear, np.maximum(sign * was[few], 0) + 1, 0) * sign
        table["shown"] = shown
        for sign in (1, -1):
            side[sign * shown >= self.persistence] = sign

    def _is_clear(self, x: Floats, y: Floats, slope: Floats) -> BoolArray:
        """Which slopes stand out of the noise, and whose lines are not too low."""
        there = np.isfinite(y)
        count = there.sum(0)
        rest = y - slope * x[:, None]
        height = np.nanmedian(rest, axis=0)  # of the line at the latest interval, where x is 0
        rest -= height
        carried = carried_over(rest, removed=2)
        alone = count * (1 - carried) / (1 + carried)  # values that would say as much if each were independent
        centre = np.where(there, x[:, None], 0.0).sum(0) / count
        spread_x = np.where(there, (x[:, None] - centre) ** 2, 0.0).sum(0) / count
        error = np.maximum(robust_spread(rest), np.finfo(np.float32).eps) / np.sqrt(alone * spread_x)
        clear: BoolArray = np.abs(slope) >= CLEAR * error
        if self.above is not None:
            start = height + slope * x[np.argmax(there, axis=0)]
            clear &= np.maximum(height, start) >= np.log(self.above)
        return clear

    def _tell(self, frame: Frame, reading: Reading, values: FloatArray, judged: BoolArray) -> Sequence[Verdict]:
        table = self._table
        failing = table["side"] != 0
        if not failing.any():
            if not self._open or not judged.any():
                return ()
            self._open = False
            evidence = f"{self.signal} no longer {'drifts' if self.direction == 'both' else WORDS[self.direction]}"
            return (self._verdict(frame, reading, values, int(np.flatnonzero(judged)[0]), evidence, active=False),)
        self._open = True
        told = np.flatnonzero(failing & judged)
        if not told.size:  # a sample that saw none of the failing cells says nothing new
            return ()
        slope = np.abs(table["slope"][told])
        at, others = int(told[np.argmax(slope)]), len(told) - 1
        first = int(self._intervals[self._intervals >= 0].min()) * self._width
        with np.errstate(over="ignore"):
            growth = float(np.exp(slope.max()))
        evidence = (
            f"{self.signal} is {number(float(values[at]))} and {WORDS['up' if table['side'][at] > 0 else 'down']} "
            f"{number(growth)} times per 1,000 steps, by {int(table['points'][at])} samples of the last "
            f"{frame.step - first} steps{more(others)}"
        )
        return (self._verdict(frame, reading, values, at, evidence, others),)

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        values: FloatArray,
        at: int,
        evidence: str,
        others: int = 0,
        active: bool = True,
    ) -> Verdict:
        return verdict_at(
            self,
            "trend",
            frame,
            self._table,
            reading,
            at,
            severity=self.severity,
            value=float(values[at]),
            evidence=evidence,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "open": self._open,
            "width": self._width,
            "intervals": self._intervals.tolist(),
            "course": self._course.state_dict(),
            "table": self._table.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open, self._width = bool(state["open"]), int(state["width"])
        self._table.load_state_dict(state["table"])
        self._course.load_state_dict(state["course"])
        rows = np.array(state["intervals"])
        # A window of another length is lost with its values (CellTable): no row of it may count.
        self._intervals = rows if rows.shape == self._intervals.shape else np.full(ROWS, -1)
