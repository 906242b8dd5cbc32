"""A signal that has left its level and stays away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.baseline import Course, Past, trained_by
from traindiag.rules.cell_table import Fill, verdict_at
from traindiag.rules.line_fit import Floats, carried_over, robust_spread
from traindiag.rules.rule import COOLDOWN, Direction, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

CLIP = 5.0
"""Largest score of one value, so that no single one is a shift: the smallest healthy ``limit`` lies above it."""

FAR = 100.0
"""Deviations at which a value is cut off before it is compared with the one before: zero is infinitely far down."""

FLAT = 0.01
"""Least deviation, as a share of the level: a history without any noise must not make everything a shift."""

SUMS: Mapping[str, Fill] = {"up": 0.0, "down": 0.0, "up_for": 0, "down_for": 0}
"""Columns: what has added up for each direction, and over how many values."""


class Shift(Rule):
    """Speaks when a signal has moved to another level, by the test of Page and Hinkley.

    The baseline is the median of a cell's first ``min_samples`` values, the coefficient by which each of its
    deviations carries over into the next (noise of training is seldom independent), and the robust deviation (1.4826
    times the MAD) of what is left. A later value's score is its own such remainder in those deviations, cut off at 5.
    What scores exceed ``delta`` by adds up, never below zero, and beyond ``limit`` the level has shifted. That is
    told once; then the baseline is learned anew from the values that follow.

    Signals that are positive by definition are judged by their logarithm. There zero is infinitely far down; it is
    judged and never learned. NaN, infinity and what else has no logarithm are neither. The baseline begins after the
    learning rate's warm-up, and begins anew where the learning rate jumps
    (:data:`~traindiag.rules.baseline.LR_JUMP`). Values of steps that were taken back by a resumed job never happened,
    and what had added up until then starts at zero.

    By default it speaks less than once in 10,000 values of a healthy cell for each direction (measured: .05 times for
    independent log-normal noise, .6 times for AR(0.9); skewed values that are not judged by their logarithm: 2.2). A
    shift by 3 deviations of independent noise is told after 6 values, by 5 after 4. What carries over hides shifts:
    of those by 3 deviations of AR(0.9) half are told within 200 values.

    Args:
        signal: Name of the signal.
        direction: What is told: shifts ``up``, ``down`` or ``both``.
        delta: Score that is still healthy when it lasts: about half of the smallest shift that matters.
        limit: Sum of the excess that is a shift.
        min_samples: Values that the baseline is learned from.
        logarithm: Whether to judge by the logarithm; by default as the signal is declared.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique; made of the signal where it is not given.

    Raises:
        ValueError: If an argument is out of its range or the signal does not exist.

    References:
        E. S. Page, Continuous inspection schemes, Biometrika 41, 1954; D. V. Hinkley, Inference about the
        change-point from cumulative sum tests, Biometrika 58, 1971.

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Shift("reward/kl", min_samples=16)
        >>> for step, value in enumerate([1.0, 1.2, 0.9, 1.1] * 5 + [2.0, 2.1, 1.9, 2.0]):
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), value)
        ...     for verdict in rule.update(Frame(step, "fast", {"reward/kl": reading}, RunInfo())):
        ...         print(step, verdict.evidence)
        23 reward/kl is 2 and has been above its level 1.05 for 4 values
    """

    patient = True  # it looks back over many steps

    def __init__(
        self,
        signal: str,
        *,
        direction: Direction = "up",
        delta: float = 0.75,
        limit: float = 15.0,
        min_samples: int = 50,
        logarithm: bool | None = None,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "warning",
        name: str | None = None,
    ) -> None:
        check_signal(signal)
        arguments.direction(direction)
        arguments.above(0.0, delta=delta)
        if delta >= CLIP:
            raise ValueError(f"delta must lie below the largest score of a value, {CLIP:g}, got {delta!r}")
        arguments.above(CLIP, limit=limit)
        arguments.at_least(16, min_samples=min_samples)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.signal, self.signals = signal, (signal,)
        self.direction, self.delta, self.limit = direction, delta, limit
        self.min_samples, self.logarithm, self.cooldown = min_samples, logarithm, cooldown
        self.where, self.severity = where, severity
        what = {"up": "shift up", "down": "shift down", "both": "shift"}[direction]
        self.name = name or f"{signal} {what}" + ("" if where == "*" else f" at {where}")
        self._course = Course()
        self._table = Past(
            where,
            min_samples,
            learned=False,
            level=np.nan,
            carried=0.0,
            spread=np.nan,
            before=0.0,
            **SUMS,
        )
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(self.signal)
        if reading is None:
            return ()
        table = self._table
        values, seen = table.align(reading)
        if self._turn(frame):
            return ()
        log = self._judges_logarithm(reading)
        with np.errstate(divide="ignore", invalid="ignore"):
            now = np.log(values, dtype=np.float64) if log else values.astype(np.float64)
        judged = seen & (now < np.inf) & ((now > -np.inf) | (values == 0))  # neither NaN nor what has no logarithm
        if not judged.any():
            return ()
        learned = table["learned"].copy()
        shifted = self._add_up(now, np.flatnonzero(judged & learned))
        self._learn(now, np.flatnonzero(judged & ~learned & np.isfinite(now)), frame.step, log)
        if shifted.size:
            self._open = True
            verdict = self._shift(frame, reading, values, shifted)
            gone = np.zeros(now.shape, np.bool_)
            gone[shifted] = True
            self._forget(gone)
            return (verdict,)
        if not self._open:
            return ()
        self._open = False
        at = int(np.flatnonzero(judged)[0])
        evidence = f"{self.signal} is {number(float(values[at]))}; its level is being learned anew"
        return (self._verdict(frame, reading, values, at, None, evidence, active=False),)

    def _turn(self, frame: Frame) -> bool:
        """Lets go of what is no measure for this frame; whether the frame itself is none."""
        table, turn = self._table, self._course.follow(frame)
        if turn.back_to is not None:
            table["learned"] &= ~table.take_back(turn.back_to)
            for column in ("before", *SUMS):
                table[column][:] = 0
        if turn.warming or turn.jumped:
            assert table.cells is not None
            every = np.ones(len(table.cells), np.bool_)
            self._forget(every if turn.warming else trained_by(table.cells, turn.jumped))
        return turn.warming

    def _forget(self, cells: BoolArray) -> None:
        self._table.forget(cells)
        self._table["learned"] &= ~cells

    def _add_up(self, now: Floats, at: NDArray[np.intp]) -> NDArray[np.intp]:
        """Adds the scores of some cells; which of them have shifted."""
        table = self._table
        if not at.size:
            return at
        spread = table["spread"][at]
        away = np.clip((now[at] - table["level"][at]) / spread, -FAR, FAR)
        score = np.clip(away - table["carried"][at] * table["before"][at], -CLIP, CLIP)
        table["before"][at] = away
        shifted = np.zeros(at.shape, np.bool_)
        for side, sign in (("up", 1), ("down", -1)):
            if self.direction in (side, "both"):
                total = np.maximum(table[side][at] + sign * score - self.delta, 0.0)
                table[side][at] = total
                table[f"{side}_for"][at] = np.where(total > 0, table[f"{side}_for"][at] + 1, 0)
                shifted |= total > self.limit
        return at[shifted]

    def _learn(self, now: Floats, at: NDArray[np.intp], step: int, log: bool) -> None:
        table = self._table
        table.push(now, at, step)
        full = at[table["count"][at] == self.min_samples]
        if not full.size:
            return
        past = table.last(self.min_samples, full)
        level = np.median(past, axis=0)
        away = past - level
        carried = carried_over(away, removed=1)
        rest = away[1:] - carried * away[:-1]
        least = FLAT if log else np.maximum(FLAT * np.abs(level), np.finfo(np.float32).tiny)
        spread = np.maximum(robust_spread(rest - np.median(rest, axis=0)), least)
        table["learned"][full] = True
        table["level"][full], table["carried"][full], table["spread"][full] = level, carried, spread
        table["before"][full] = np.clip(away[-1] / spread, -FAR, FAR)
        for column in SUMS:
            table[column][full] = 0

    def _shift(self, frame: Frame, reading: Reading, values: FloatArray, shifted: NDArray[np.intp]) -> Verdict:
        """About the cell that has gone farthest."""
        table = self._table
        at = int(shifted[np.argmax(np.abs(table["before"][shifted]))])
        side = "up" if table["up"][at] > self.limit else "down"
        level, others = float(table["level"][at]), len(shifted) - 1
        usual = float(np.exp(level)) if self._judges_logarithm(reading) else level
        evidence = (
            f"{self.signal} is {number(float(values[at]))} and has been {'above' if side == 'up' else 'below'} its "
            f"level {number(usual)} for {int(table[f'{side}_for'][at])} values{more(others)}"
        )
        return self._verdict(frame, reading, values, at, usual, evidence, others)

    def _judges_logarithm(self, reading: Reading) -> bool:
        return reading.signal.positive if self.logarithm is None else self.logarithm

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        values: FloatArray,
        at: int,
        limit: float | None,
        evidence: str,
        others: int = 0,
        active: bool = True,
    ) -> Verdict:
        return verdict_at(
            self,
            "shift",
            frame,
            self._table,
            reading,
            at,
            severity=self.severity,
            value=float(values[at]),
            evidence=evidence,
            limit=limit,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open, "course": self._course.state_dict(), "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open = bool(state["open"])
        self._course.load_state_dict(state["course"])
        self._table.load_state_dict(state["table"])
        self._table["learned"] &= self._table["count"] == self.min_samples  # else it was learned by other settings
