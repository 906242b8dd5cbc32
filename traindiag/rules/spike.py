"""A sudden jump of a positive signal, or a sudden fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median as middle
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import BoolArray, Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.baseline import Course, Past, trained_by
from traindiag.rules.cell_table import verdict_at
from traindiag.rules.line_fit import Floats
from traindiag.rules.rule import COOLDOWN, Direction, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

MIN_SAMPLES = 4
"""Values of a cell before it is judged."""

JUDGED_BY_SPREAD = 16
"""Values before the spread is known well enough to judge by; until then the factor decides alone."""

RECENT = 8
"""Values that the level is taken from: few, because a young run's gradient norm may fall by half in as many steps."""

RISE = float(np.log(2.0))
"""Growth from one spike to the next that counts as climbing. That of BLOOM-176B was 2.5 to 9 times a step."""

PATIENT_FACTOR = 4.0
"""What grows by this much over its recent level is judged at once anyway. Notes can wait."""


class Spike(Rule):
    """Speaks when a value stands out of its own recent past, on a logarithmic scale.

    A value is a spike when it is ``factor`` times the median of the cell's last 8 values or more, and, from 16 values
    on, ``z`` robust standard deviations above it. The deviation is that of the steps from one value to the next
    (1.4826 / sqrt 2 times the median absolute step of the logarithms), which a trend does not inflate. A value is
    held against earlier ones only and enters them after it was judged, so a level that stays up soon is the new
    normal. NaN, infinity and values not above zero never enter and are never judged; but zero is a fall from
    anything, for as long as it stays.

    Values of the learning rate's warm-up are held against each other, and leave as soon as there are 16 later ones.
    Where the learning rate jumps (:data:`~traindiag.rules.baseline.LR_JUMP`) the past is forgotten, so the next 4
    values are not judged. Values of steps that were taken back by a resumed job never happened.

    On noise without events (log-normal of sigma 0.35, independent or AR(0.9)) it speaks less than twice in 10,000
    values of a cell for each direction; heavy tails are spikes to it.

    Args:
        signal: Name of a signal with positive values.
        factor: Least ratio to the median.
        direction: What is told: jumps ``up``, falls ``down`` to a ``factor``-th of the median, or ``both``.
        z: Least robust standard score of the logarithm.
        window: Values of the past that the deviation is taken from.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
        rising: Spikes in a row, each twice as large as the one before, from which on an info is a warning: a
            value that jumped once may be an odd batch, and one that goes on climbing is on its way.
        otherwise: Signal to judge in runs that have no ``signal``.
        name: Name of the rule, which must be unique; made of the signal where it is not given.

    Raises:
        ValueError: If an argument is out of its range or a signal does not exist.

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Spike("reward/kl")
        >>> for step, value in enumerate([1.0, 1.2, 0.9, 1.1, 10.0]):
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), value)
        ...     verdicts = rule.update(Frame(step, "fast", {"reward/kl": reading}, RunInfo()))
        >>> verdicts[0].evidence
        'reward/kl is 10, 9.53 times the median 1.05 of the last 4 values'
    """

    def __init__(
        self,
        signal: str,
        *,
        factor: float = 4.0,
        z: float = 4.0,
        window: int = 100,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "info",
        rising: int | None = None,
        otherwise: str | None = None,
        direction: Direction = "up",
        name: str | None = None,
    ) -> None:
        for given in (signal, otherwise):
            if given is not None:
                check_signal(given)
        arguments.above(1.0, factor=factor)
        arguments.above(0.0, z=z)
        arguments.at_least(RECENT, window=window)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        arguments.direction(direction)
        arguments.at_least(2, rising=rising)
        self.rising = rising
        self.signal, self.otherwise = signal, otherwise
        self.signals = (signal,) if otherwise is None else (signal, otherwise)
        self.factor, self.z, self.window, self.cooldown = factor, z, window, cooldown
        self.where, self.severity, self.direction = where, severity, direction
        self.patient = (severity == "info" and rising is None) or (factor >= PATIENT_FACTOR and direction == "up")
        what = {"up": "spike", "down": "drop", "both": "spike or drop"}[direction]
        self.name = name or f"{signal} {what}" + ("" if where == "*" else f" at {where}")
        self._log_factor = float(np.log(factor))
        self._table = Past(where, window, active=False, climbed=0)
        self._course = Course()
        self._warm: int | None = None  # last step of warm-up, while values from there are left
        self._has_signal = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(self.signal)
        if reading is not None and not self._has_signal:
            self._has_signal = True
            self._table.load_state_dict({})  # what was learned from the other signal is of another size
        if reading is None and self.otherwise is not None and not self._has_signal:
            reading = frame.readings.get(self.otherwise)
        if reading is None:
            return ()
        table = self._table
        values, seen = table.align(reading)
        self._turn(frame)
        least = values >= 0 if self.direction != "up" else values > 0
        judged = seen & least & (values < np.inf)
        if not judged.any():
            return ()
        with np.errstate(divide="ignore"):
            now = np.log(np.where(judged, values, 1), dtype=np.float64)
        count, was = table["count"], table["active"]
        spiking, median = self._find(now, judged & (count >= MIN_SAMPLES))
        if self.rising and (spiking.any() or was.any()):
            climbs = spiking & ((table["climbed"] == 0) | (now >= table.last(1)[0] + RISE))
            table["climbed"] = np.where(judged, np.where(climbs, table["climbed"] + 1, 0), table["climbed"])
        table.push(now, np.flatnonzero(judged & (values > 0)), frame.step)
        if not (spiking.any() or was.any()):
            return ()
        table["active"] = np.where(judged, spiking, was)
        if table["active"].any():
            told = np.flatnonzero(spiking)
            if not told.size:
                return ()
            at = int(told[np.argmax(np.abs(now[told] - median[told]))])
            value, usual, others = float(values[at]), float(np.exp(median[at])), int(told.size) - 1
            up = value > usual
            ratio = f"{number(value / usual)} times the" if up else "down from the"
            past = int(count[at]) - (value > 0)
            evidence = (
                f"{reading.signal.name} is {number(value)}, {ratio} median {number(usual)} "
                f"of the last {min(past, RECENT)} values{more(others)}"
            )
            limit = usual * self.factor if up else usual / self.factor
            climbed = int(table["climbed"][at])
            if self.rising and climbed >= self.rising:
                evidence += f", and has climbed for {climbed} steps"
            return (self._verdict(frame, reading, value, at, limit, evidence, others, climbed=climbed),)
        at = int(np.flatnonzero(was)[0])
        evidence = f"{reading.signal.name} is back at {number(float(values[at]))}"
        return (self._verdict(frame, reading, float(values[at]), at, None, evidence, active=False),)

    def _turn(self, frame: Frame) -> None:
        """Lets go of values that are no measure for this frame."""
        table, turn = self._table, self._course.follow(frame)
        if turn.back_to is not None:
            table.take_back(turn.back_to)
        if turn.jumped:
            assert table.cells is not None
            table.forget(trained_by(table.cells, turn.jumped))
        if turn.warming:
            self._warm = frame.step
        elif self._warm is not None:
            early = (table["steps"] >= 0) & (table["steps"] <= self._warm)
            later = (table["steps"] > self._warm).sum(0)
            gone = early & (later >= min(JUDGED_BY_SPREAD, self.window))
            if gone.any():
                table.keep(~gone)
            if not (early & ~gone).any():
                self._warm = None

    def _find(self, now: Floats, judged: BoolArray) -> tuple[BoolArray, Floats]:
        """Which cells stand out, and the medians that they were held against, both ``[n]``."""
        table, least = self._table, self._log_factor
        recent = table.last(RECENT)
        median, spiking = np.full(now.shape, np.nan), np.zeros(now.shape, np.bool_)
        # A value that is not `factor` times the smallest of them is no spike: medians are for the few left over.
        suspect = np.zeros(now.shape, np.bool_)
        if self.direction != "down":
            suspect |= now >= np.fmin.reduce(recent, axis=0) + least
        if self.direction != "up":
            suspect |= now <= np.fmax.reduce(recent, axis=0) - least
        few = np.flatnonzero(suspect & judged)
        if few.size:
            median[few] = _medians(recent[:, few])
            beyond = now[few] - median[few]
            if self.direction != "up":
                beyond = -beyond if self.direction == "down" else np.abs(beyond)
            far = beyond >= least
            few, beyond = few[far], beyond[far]
        if few.size:
            steps = np.abs(np.diff(table.last(self.window, few), axis=0))
            spread = 1.4826 / np.sqrt(2) * np.nanmedian(steps, axis=0)
            spiking[few] = (table["count"][few] < JUDGED_BY_SPREAD) | (beyond >= self.z * spread)
        return spiking, median

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        value: float,
        at: int,
        limit: float | None,
        evidence: str,
        others: int = 0,
        active: bool = True,
        climbed: int = 0,
    ) -> Verdict:
        worse = self.severity == "info" and self.rising is not None and climbed >= self.rising
        return verdict_at(
            self,
            "spike",
            frame,
            self._table,
            reading,
            at,
            severity="warning" if worse else self.severity,
            value=value,
            evidence=evidence,
            limit=limit,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "has_signal": self._has_signal,
            "warm": self._warm,
            "course": self._course.state_dict(),
            "table": self._table.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._has_signal = bool(state["has_signal"])
        self._warm = state.get("warm")
        self._course.load_state_dict(state.get("course", {}))
        self._table.load_state_dict(state["table"])


def _medians(columns: Floats) -> Floats:
    """Of each column, NaN left out; of a few columns without arrays, which have a high price for eight numbers."""
    if columns.shape[1] > 4:
        found: Floats = np.nanmedian(columns, axis=0)
        return found
    return np.array([middle([x for x in column if x == x]) for column in columns.T.tolist()])
