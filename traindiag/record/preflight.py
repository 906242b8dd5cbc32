"""What a rehearsal of a few steps has found, before a run begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from traindiag.record.coverage import Coverage
from traindiag.record.series import History


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the rehearsal has found.

    Args:
        severity: ``warning`` for a fault, ``info`` for what is good to know.
        text: What it is.
    """

    severity: Literal["info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Cost:
    """Host time of diagnostics as shares of the time of a step without them.

    Args:
        idle: Of a step that is not sampled.
        sampled: Of a sampled one.
        every_n_steps: Cadence.
        seconds_per_step: Of a step without them.

    Example:
        >>> round(Cost(idle=0.001, sampled=0.051, every_n_steps=10, seconds_per_step=0.4).share, 4)
        0.006
    """

    idle: float
    sampled: float
    every_n_steps: int
    seconds_per_step: float

    @property
    def share(self) -> float:
        """Over all steps at this cadence."""
        return self.idle + (self.sampled - self.idle) / self.every_n_steps


@dataclass(frozen=True, slots=True)
class Preflight:
    """The result of :func:`traindiag.preflight`.

    Args:
        loss: Loss of the first step.
        classes: Classes of its cross-entropy, None where none was seen.
        findings: Faults first.
        coverage: What is seen and what is not.
        activation_growth: ``log(rms of the last block / rms of the first) / blocks`` by stack; about 0 is best.
        gradient_growth: The same of the loss's gradient with respect to what blocks return, from the last block back
            to the first: above 0 it grows on its way to the input, below it fades.
        history: Every signal, at each rehearsed step.
        cost: What diagnostics will cost, None where it was not measured.
    """

    loss: float
    classes: int | None
    findings: tuple[Finding, ...]
    coverage: tuple[Coverage, ...]
    activation_growth: Mapping[str, float]
    gradient_growth: Mapping[str, float]
    history: History = field(repr=False)
    cost: Cost | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return all(f.severity != "warning" for f in self.findings)
