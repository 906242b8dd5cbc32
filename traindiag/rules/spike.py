"""A sudden jump of a positive signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.cell_table import CellTable
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

MIN_SAMPLES = 4
"""Values of a cell before it is judged."""

JUDGED_BY_SPREAD = 16
"""Values before the spread is known well enough to judge by; until then the factor decides alone."""

RECENT = 8
"""Values that the level is taken from: few, because a young run's gradient norm may fall by half in as many steps."""

PATIENT_FACTOR = 4.0
"""What grows by this much over its recent level is judged at once anyway."""


class Spike(Rule):
    """Speaks when a value stands out of its own recent past, on a logarithmic scale.

    A value is a spike when it is ``factor`` times the median of the cell's last 8 values or more, and, from 16 values
    on, ``z`` robust standard deviations above it. The deviation is that of the steps from one value to the next
    (1.4826 / sqrt 2 times the median absolute step of the logarithms), which a trend does not inflate. A value is
    held against earlier ones only and enters them after it was judged, so a level that stays up soon is the new
    normal. NaN, infinity and values not above zero never enter and are never judged.

    Args:
        signal: Name of a signal with positive values.
        factor: Least ratio to the median.
        z: Least robust standard score of the logarithm.
        window: Values of the past that the deviation is taken from.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
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
        otherwise: str | None = None,
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
        self.signal, self.otherwise = signal, otherwise
        self.signals = (signal,) if otherwise is None else (signal, otherwise)
        self.factor, self.z, self.window, self.cooldown = factor, z, window, cooldown
        self.where, self.severity = where, severity
        self.patient = factor >= PATIENT_FACTOR
        self.name = name or f"{signal} spike" + ("" if where == "*" else f" at {where}")
        self._log_factor = float(np.log(factor))
        self._table = CellTable(where, logs=(window, np.nan), recent=(RECENT, np.nan), count=0, active=False)
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
        judged = seen & (values > 0) & (values < np.inf)
        if not judged.any():
            return ()
        now = np.log(np.where(judged, values, 1), dtype=np.float64)
        logs, recent, count, was = table["logs"], table["recent"], table["count"], table["active"]
        # A value that is not `factor` times the smallest of them is no spike: medians are for the few left over.
        suspect = now >= np.fmin.reduce(recent, axis=0) + self._log_factor
        median = np.full(values.shape, np.nan)
        spiking = np.zeros(values.shape, np.bool_)
        if suspect.any() and (few := np.flatnonzero(suspect & judged & (count >= MIN_SAMPLES))).size:
            median[few] = np.nanmedian(recent[:, few], axis=0)
            oldest_first = logs[(count[few] + np.arange(self.window)[:, None]) % self.window, few]
            spread = 1.4826 / np.sqrt(2) * np.nanmedian(np.abs(np.diff(oldest_first, axis=0)), axis=0)
            above = now[few] - median[few]
            clear = (count[few] < JUDGED_BY_SPREAD) | (above >= self.z * spread)
            spiking[few] = (above >= self._log_factor) & clear
        column = np.flatnonzero(judged)
        logs[count[column] % self.window, column] = recent[count[column] % RECENT, column] = now[column]
        count += judged
        if not (spiking.any() or was.any()):
            return ()
        table["active"] = np.where(judged, spiking, was)
        if table["active"].any():
            told = np.flatnonzero(spiking)
            if not told.size:
                return ()
            at = int(told[np.argmax(now[told] - median[told])])
            value, usual, others = float(values[at]), float(np.exp(median[at])), int(told.size) - 1
            evidence = (
                f"{reading.signal.name} is {number(value)}, {number(value / usual)} times the median {number(usual)} "
                f"of the last {min(int(count[at]) - 1, RECENT)} values{more(others)}"
            )
            return (self._verdict(frame, reading, value, at, usual * self.factor, evidence, others),)
        at = int(np.flatnonzero(was)[0])
        evidence = f"{reading.signal.name} is back at {number(float(values[at]))}"
        return (self._verdict(frame, reading, float(values[at]), at, None, evidence, active=False),)

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
    ) -> Verdict:
        assert self._table.cells is not None
        return Verdict(
            self.name,
            "spike",
            reading.signal.name,
            frame.step,
            active,
            self.severity,
            self._table.cells[at],
            value,
            limit,
            others,
            rank=self._table.rank(reading, at),
            evidence=evidence,
            cooldown=self.cooldown,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"has_signal": self._has_signal, "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._has_signal = bool(state["has_signal"])
        self._table.load_state_dict(state["table"])
