"""A signal that has grown far beyond what it was when the run had settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.baseline import Course
from traindiag.rules.cell_table import CellTable, verdict_at
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

RELEASE = 0.5
"""Share of the limit, as a ratio to the baseline, that a signal must fall below to be over."""


class Growth(Rule):
    """Speaks while a signal stays ``factor`` times above its own early level.

    The level of a cell is the median of its first ``samples`` values, warm-up left out where ``settled``. What is
    held against it is the smallest of the last ``persistence`` values, so that one outlier says nothing. For
    quantities that have no scale of their own, such as the size of a residual stream: their growth tells, their size
    does not.

    NaN, infinity and values not above zero are left out.

    Of values that only scatter around 1 (log-normal of sigma 0.35) it says, at a factor of 4, nothing in 400,000
    where they are independent and at most 4 times in 10,000 where they wander (AR(0.9)): the early level of three
    samples may be a low one. With 50 samples for the level, or half of 4 cells, it says nothing of either.

    Args:
        signal: Name of a signal with positive values.
        factor: Ratio to the early level that is too much.
        critical_factor: Beyond this the severity is critical.
        above: Value that must be reached too.
        samples: Values that the early level is taken from.
        persistence: Values in a row that must be beyond.
        settled: Whether the early level is that after warm-up, not that at the beginning.
        share: Share of the cells seen that must have grown; with 0.5 the median must have.
        every: Looks at every n-th step only: what grows over hundreds need not be looked at in each.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        warns_with: Signal that a run must have, or the severity is info. Outputs of a cross-entropy have no reason to
            grow for long; the values of a critic grow with its returns, and all activations behind them.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique; made of the signal where it is not given.

    Raises:
        ValueError: If an argument is out of its range or the signal does not exist.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Growth("reward/kl", factor=4.0, samples=3, persistence=2)
        >>> for step, value in enumerate([1.0, 1.2, 0.9, 9.0, 1.1, 4.5, 5.0]):
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), value)
        ...     verdicts = rule.update(Frame(step, "slow", {"reward/kl": reading}, RunInfo()))
        >>> verdicts[0].evidence
        'reward/kl is 5, at least 4.5 times the 1 that it was at first, for 2 samples'
    """

    patient = True  # it looks back over many steps

    def __init__(
        self,
        signal: str,
        *,
        factor: float,
        critical_factor: float | None = None,
        above: float | None = None,
        samples: int = 3,
        persistence: int = 3,
        settled: bool = False,
        share: float = 0.0,
        every: int = 1,
        cooldown: int = COOLDOWN,
        where: str = "*",
        warns_with: str | None = None,
        severity: Severity = "warning",
        name: str | None = None,
    ) -> None:
        check_signal(signal)
        arguments.above(1.0, factor=factor)
        arguments.above(factor, critical_factor=critical_factor)
        arguments.above(0.0, above=above)
        arguments.at_least(1, samples=samples, persistence=persistence, every=every)
        arguments.share(share=share)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        if warns_with is not None:
            check_signal(warns_with)
        self.signal, self.signals = signal, (signal,) if warns_with is None else (signal, warns_with)
        self.factor, self.critical_factor, self.above = factor, critical_factor, above
        self.samples, self.persistence, self.settled, self.share = samples, persistence, settled, share
        self.every = every
        self.cooldown, self.where, self.warns_with, self.severity = cooldown, where, warns_with, severity
        self.name = name or f"{signal} grows {number(factor)} times" + ("" if where == "*" else f" at {where}")
        self._table = CellTable(
            where, first=(samples, np.nan), recent=(persistence, np.nan), count=0, level=np.nan, active=False
        )
        self._course = Course()
        self._earnest = warns_with is None

    def update(self, frame: Frame) -> Sequence[Verdict]:
        self._earnest = self._earnest or self.warns_with in frame.readings
        reading = frame.readings.get(self.signal)
        if reading is None or frame.step % self.every:
            return ()
        warming = self._course.follow(frame).warming
        table = self._table
        values, seen = table.align(reading)
        judged = seen & (values > 0) & (values < np.inf)
        if (self.settled and warming) or not judged.any():
            return ()
        self._learn(values, judged)
        with np.errstate(invalid="ignore", divide="ignore"):
            least = table["recent"].min(axis=0) / table["level"]  # NaN until there are enough
        beyond = judged & (least >= self.factor)
        if self.above is not None:
            beyond &= values >= self.above
        if beyond.sum() < self.share * judged.sum():
            beyond[:] = False
        was = table["active"]
        if not (beyond.any() or was.any()):
            return ()
        stays = was & (~judged | (values > RELEASE * self.factor * table["level"]))
        table["active"] = active = beyond | (stays if not self.share or beyond.any() else stays & ~judged)
        if beyond.any():
            at = int(np.argmax(np.where(beyond, least, 0)))
            return (self._verdict(frame, reading, values, at, float(least[at]), int(beyond.sum()) - 1),)
        if active.any():
            return ()
        return (self._verdict(frame, reading, values, int(np.flatnonzero(was)[0]), 0.0, 0, active=False),)

    def _learn(self, values: np.ndarray[Any, Any], judged: np.ndarray[Any, Any]) -> None:
        table = self._table
        first, recent, count = table["first"], table["recent"], table["count"]
        column = np.flatnonzero(judged)
        recent[count[column] % self.persistence, column] = values[column]
        young = column[count[column] < self.samples]
        if young.size:
            first[count[young], young] = values[young]
        count[column] += 1
        full = column[count[column] == self.samples]
        if full.size:
            table["level"][full] = np.median(first[:, full], axis=0)
            recent[:, full] = np.nan  # the values of the level are not held against it

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        values: np.ndarray[Any, Any],
        at: int,
        ratio: float,
        others: int,
        active: bool = True,
    ) -> Verdict:
        table = self._table
        assert table.cells is not None
        value, level = float(values[at]), float(table["level"][at])
        critical = self.critical_factor is not None and ratio >= self.critical_factor
        severity: Severity = "critical" if critical else self.severity
        if not self._earnest:
            severity = "info"
        when = "once its learning rate had warmed up" if self.settled else "at first"
        if active:
            evidence = (
                f"{self.signal} is {number(value)}, at least {number(ratio)} times the {number(level)} that it was "
                f"{when}, for {self.persistence} samples{more(others)}"
            )
        else:
            evidence = f"{self.signal} is back at {number(value)}, {number(value / level)} times what it was {when}"
        return verdict_at(
            self,
            "trend",
            frame,
            table,
            reading,
            at,
            severity=severity,
            value=value,
            evidence=evidence,
            limit=level * (self.critical_factor if critical and self.critical_factor else self.factor),
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "course": self._course.state_dict(),
            "table": self._table.state_dict(),
            "earnest": self._earnest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._course.load_state_dict(state["course"])
        self._table.load_state_dict(state["table"])
        self._earnest = self.warns_with is None or bool(state.get("earnest", False))
