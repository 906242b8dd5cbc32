"""The numbers of one step, as rules, logs and panels get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane, Signal

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of one signal at one step.

    Absent is not NaN: ``seen[i]`` tells whether cell ``i`` was measured at all; where it was, a NaN is a result.

    Args:
        signal: What was measured.
        cells: Where, ``n`` cells.
        values: float32 ``[n]``; NaN where not seen.
        seen: bool ``[n]``.
        ranks: int64 ``[n]``, the rank that an extreme value came from, -1 where that is unknown; or None.
    """

    signal: Signal
    cells: Cells
    values: FloatArray
    seen: BoolArray
    ranks: IntArray | None = None

    def __post_init__(self) -> None:
        n = (len(self.cells),)
        if self.values.shape != n or self.seen.shape != n:
            raise ValueError(
                f"{self.signal.name}: expected values and seen of shape {n}, "
                f"got {self.values.shape} and {self.seen.shape}"
            )

    @classmethod
    def scalar(cls, signal: Signal, value: float) -> Reading:
        return cls(signal, Cells.single(), np.array([value], np.float32), np.ones(1, np.bool_))

    @classmethod
    def masked(
        cls,
        signal: Signal,
        cells: Cells,
        values: NDArray[np.floating[Any]],
        seen: BoolArray,
        ranks: IntArray | None = None,
    ) -> Reading:
        """From numbers of any precision, whatever stands where nothing was seen; too large ones become infinite."""
        with np.errstate(over="ignore"):
            return cls(signal, cells, np.where(seen, values, np.nan).astype(np.float32), seen, ranks)

    def worst(self) -> int | None:
        """Index of the worst cell: a non-finite one if there is any, otherwise the extreme one."""
        seen = np.flatnonzero(self.seen)
        if not seen.size:
            return None
        values = self.values[seen]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            return int(seen[bad[0]])
        pick = np.argmax if self.signal.worst == "max" else np.argmin
        return int(seen[pick(values)])


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything known of one step on one lane. A rule sees nothing else.

    Args:
        step: The engine's count of optimizer steps tried (0-based), the axis of every panel.
        lane: ``fast``, ``slow`` or ``active``.
        readings: By signal name.
        run: What is being trained.
        time: Seconds since the epoch when the step ended.
        seconds_per_step: Recent pace, None in the first steps; turns steps into hours.
        updates: Updates done so far, by optimizer.
        learning_rates: By optimizer.
        segment: 0 for the first job of a run, one more after every resume.
        early: On the slow lane: no sample, only what is looked at in the first steps whatever the cadence.
        batches: What this rank's batches of the step were called, one text a micro-batch; empty where nobody said.
    """

    step: int
    lane: Lane
    readings: Mapping[str, Reading]
    run: RunInfo
    time: float = 0.0
    seconds_per_step: float | None = None
    updates: Mapping[str, int] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    segment: int = 0
    early: bool = False
    batches: tuple[str, ...] = ()

    @property
    def sampled(self) -> bool:
        """Whether this is what a sample has shown."""
        return self.lane == "slow" and not self.early
