"""A loss that gives back much of what was learned, from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.cell_table import CellTable, verdict_at
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import number

_LOSS = "loss/value"
_FIRST, _RECENT, _SPREAD = 3, 8, 64
_STUCK = 50
"""Values after which a loss that stays high is the new normal."""


class LossSurge(Rule):
    """Speaks when the loss rises at once by a large share of what the run has learned so far.

    What was learned is the median of the first 3 values less the median of the last 8. That measure has the scale of
    the task: a loss near zero that is a hundred times as large in an odd batch does not come near half of it. And
    it must stand out of the noise from batch to batch by ``z`` robust deviations, taken from the changes of the last
    64 steps. A run that has learned less than ``learned`` of its first loss is not judged; losses that do not fall,
    such as those of critics and adversaries, never are.

    It confirms, and never predicts. NaN and infinity are left to
    :class:`~traindiag.rules.nonfinite.NonFinite`.

    Args:
        share: Share of what was learned that is too much to give back.
        learned: Share of the first loss that must have been learned.
        z: Robust deviations that it must stand out by.
        cooldown: Steps of rest that end the event.
        warns_with: Signal that a run must have, or the severity is info. A critic's loss falls too, and jumps
            whenever its target network moves.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.run_info import RunInfo
        >>> rule = LossSurge()
        >>> for step, loss in enumerate([6.0, 5.9, 5.8, 4.0, 3.0] + [2.4] * 10 + [4.3]):
        ...     reading = Reading.scalar(BY_NAME["loss/value"], loss)
        ...     verdicts = rule.update(Frame(step, "fast", {"loss/value": reading}, RunInfo()))
        >>> verdicts[0].evidence
        'loss/value is 4.3 after 2.4: 54% of what was learned since 5.9 is gone'
    """

    patient = True  # a loss that doubles stirs, and so does the gradient of such a batch

    def __init__(
        self,
        *,
        share: float = 0.45,
        learned: float = 0.5,
        z: float = 5.0,
        cooldown: int = COOLDOWN,
        warns_with: str | None = "output/log_z",
        severity: Severity = "warning",
        name: str = "loss/surge",
    ) -> None:
        arguments.share(share=share, learned=learned)
        arguments.above(0.0, z=z)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.share, self.learned, self.z, self.cooldown = share, learned, z, cooldown
        self.warns_with, self.severity, self.name = warns_with, severity, name
        if warns_with is not None:
            check_signal(warns_with)
        self.signals = (_LOSS,) if warns_with is None else (_LOSS, warns_with)
        self._earnest = warns_with is None
        self._table = CellTable(
            first=(_FIRST, np.nan), start=np.nan, recent=(_SPREAD, np.nan), count=0, calm=0, high=0, active=False
        )

    def update(self, frame: Frame) -> Sequence[Verdict]:
        self._earnest = self._earnest or self.warns_with in frame.readings
        reading = frame.readings.get(_LOSS)
        if reading is None:
            return ()
        table = self._table
        values, seen = table.align(reading)
        told: list[tuple[float, int, float, float]] = []
        over: list[int] = []
        for i in np.flatnonzero(seen & np.isfinite(values)):  # a handful of losses at most
            at, value = int(i), float(values[i])
            found = self._judge(at, value)
            if found is not None:
                told.append((*found[:1], at, *found[1:]))
            elif table["active"][at]:
                table["active"][at] = False
                over.append(at)
        if told:
            lost, at, level, first = max(told)
            evidence = (
                f"{_LOSS} is {number(float(values[at]))} after {number(level)}: {lost:.0%} of what was learned since "
                f"{number(first)} is gone"
            )
            limit = level + self.share * (first - level)
            return (self._verdict(frame, reading, float(values[at]), at, limit, evidence, len(told) - 1),)
        if over and not table["active"].any():
            evidence = f"{_LOSS} is back at {number(float(values[over[0]]))}"
            return (self._verdict(frame, reading, float(values[over[0]]), over[0], None, evidence, active=False),)
        return ()

    def _judge(self, at: int, value: float) -> tuple[float, float, float] | None:
        """Share given back, level before, first loss; None for a value like those before it."""
        table = self._table
        count = int(table["count"][at])
        table["count"][at] += 1
        if count < _FIRST:
            table["first"][count, at] = value
            table["start"][at] = np.median(table["first"][: count + 1, at])
        first, calm = float(table["start"][at]), int(table["calm"][at])
        ring = table["recent"][:, at]
        # Nothing below this can be a surge, whatever the level is: medians are for the few left over.
        least = (1 - self.share) * float(np.fmin.reduce(ring)) + self.share * first
        if value >= least and count >= _FIRST and calm >= _RECENT:
            past = ring[(calm + np.arange(-min(calm, _SPREAD), 0)) % _SPREAD]  # oldest first
            level = float(np.median(past[-_RECENT:]))
            noise = 1.4826 / np.sqrt(2) * float(np.median(np.abs(np.diff(past))))
            learned, rise = first - level, value - level
            surges = learned > 0 and learned >= self.learned * abs(first) and rise >= self.share * learned
            if surges and rise >= self.z * noise:
                table["high"][at] += 1
                if table["high"][at] <= _STUCK:  # what stands out is no measure for what follows
                    table["active"][at] = True
                    return rise / learned, level, first
            else:
                table["high"][at] = 0
        else:
            table["high"][at] = 0
        table["recent"][calm % _SPREAD, at] = value
        table["calm"][at] += 1
        return None

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
        return verdict_at(
            self,
            "spike",
            frame,
            self._table,
            reading,
            at,
            severity=self.severity if self._earnest else "info",
            value=value,
            evidence=evidence,
            limit=limit,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"earnest": self._earnest, "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._earnest = bool(state["earnest"])
        self._table.load_state_dict(state["table"])
