"""A job that was resumed and whose optimizer began anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.frame import Frame, Reading
from traindiag.rules.rule import Rule, Verdict
from traindiag.rules.wording import names_of

EXACT = 1e-3
"""How close to 1 RMS_t is where the second moment is made of this one gradient: it is 1 but for rounding and epsilon.
In a run under way it differs from tensor to tensor by some hundredths."""

LEAST = 3
"""Tensors that have to agree; one or two may be near 1 by chance (about one in a hundred is)."""

ROUNDED = 1e-5
"""Closer than this a single tensor will do: float32 keeps seven digits, so chance needs ten thousand resumes."""

AFTERMATH = 100
"""Steps in which what follows is laid to it: about what a second moment with beta2 0.95 to 0.99 needs to be whole."""


class OptimizerStateLost(Rule):
    """Speaks when the first update of a resumed job was made with a second moment that knew no other gradient.

    With its bias corrected the second moment of Adam is then the square of the gradient itself: RMS_t is 1, in every
    tensor and to the last digits (less where part of a gradient is zero, as in an embedding). A second moment that
    was restored never looks like that. Optimizers without a second moment are not judged.

    Args:
        aftermath: Steps for which the condition is told to hold.
        name: Name of the rule, which must be unique.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.cells import Cells
        >>> from traindiag.record.run_info import RunInfo
        >>> cells = Cells(("optimizer", "parameter"), (("adam", "a"), ("adam", "b"), ("adam", "c")))
        >>> signal, rule = BY_NAME["optimizer/sentinel_rms_t"], OptimizerStateLost()
        >>> def at(step, segment, *values):
        ...     reading = Reading(signal, cells, np.float32(values), np.ones(3, np.bool_))
        ...     return rule.update(Frame(step, "fast", {signal.name: reading}, RunInfo(), segment=segment))
        >>> _ = at(0, 0, 1, 1, 1)
        >>> [v.evidence for v in at(1, 1, 1, 1, 1)]
        ['RMS_t of a, b, c is 1 at the first update after the resume: the second moment held nothing before']
    """

    signals = ("optimizer/sentinel_rms_t", "optimizer/rms_t")
    patient = True

    def __init__(self, *, aftermath: int = AFTERMATH, name: str = "optimizer/state-lost") -> None:
        self.aftermath, self.name = aftermath, name
        self._segment: int | None = None
        self._lost: int | None = None
        self._said = ""

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = next((frame.readings[s] for s in self.signals if s in frame.readings), None)
        if reading is None:
            return ()
        known, self._segment = self._segment, frame.segment
        if known is not None and known != frame.segment and (tensors := _fresh(reading)):
            self._lost = frame.step
            self._said = (
                f"RMS_t of {names_of(tensors)} is 1 at the first update after the resume: the second moment held "
                "nothing before"
            )
        if self._lost is None:
            return ()
        active = 0 <= frame.step - self._lost < self.aftermath
        if not active:
            self._lost = None
        at = int(np.flatnonzero(reading.seen)[0]) if reading.seen.any() else 0
        cell, value = reading.cells[at], float(reading.values[at])
        said = self._said if active else f"{self.aftermath} steps have passed since the resume"
        return (
            Verdict(
                self.name, "wiring", reading.signal.name, frame.step, active, cell=cell, value=value, evidence=said
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"segment": self._segment, "lost": self._lost, "said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._segment, self._lost, self._said = state["segment"], state["lost"], str(state["said"])


def _fresh(reading: Reading) -> list[str]:
    """Tensors whose second moment is their gradient alone; empty where any says otherwise."""
    values = reading.values
    away = np.abs(values - 1)
    one = reading.seen & (away <= EXACT)
    enough = one.sum() >= LEAST or (reading.seen & (away <= ROUNDED)).any()
    if (reading.seen & ~(values <= 1 + EXACT)).any() or not enough or 2 * one.sum() < reading.seen.sum():
        return []
    return [str(reading.cells.coordinates[int(i)][-1]) for i in np.flatnonzero(one)]
