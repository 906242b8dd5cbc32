"""How much of its first loss a run has left: what is small because all is learned is not a fault."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from traindiag.record.frame import Frame

LOSS = "loss/value"
_FIRST, _RECENT = 3, 8


class LossLeft:
    """The loss as a share of its first value; of several the largest share.

    Args:
        least: Share below which nothing is left to learn.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.frame import Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> left = LossLeft(0.02)
        >>> for step, loss in enumerate([2.0] * 3 + [0.01] * 8):
        ...     reading = Reading.scalar(BY_NAME[LOSS], loss)
        ...     left.follow(Frame(step, "fast", {LOSS: reading}, RunInfo()))
        >>> left.some()
        False
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self._first: dict[str, list[float]] = {}
        self._recent: dict[str, deque[float]] = {}

    def follow(self, frame: Frame) -> None:
        """Takes the losses of a frame, if it has any; what is not finite is left out."""
        reading = frame.readings.get(LOSS)
        if reading is None:
            return
        for at, value, seen in zip(reading.cells.coordinates, reading.values.tolist(), reading.seen.tolist()):
            if not (seen and np.isfinite(value)):
                continue
            name = str(at[0]) if at else ""
            first = self._first.setdefault(name, [])
            if len(first) < _FIRST:
                first.append(value)
            self._recent.setdefault(name, deque(maxlen=_RECENT)).append(value)

    def some(self) -> bool:
        """Whether there is something left to learn; true where no positive loss is known."""
        shares = [median(self._recent[n]) / median(f) for n, f in self._first.items() if median(f) > 0]
        return not shares or max(shares) >= self.least

    def state_dict(self) -> dict[str, Any]:
        return {name: [list(first), list(self._recent[name])] for name, first in self._first.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first = {name: list(first) for name, (first, _) in state.items()}
        self._recent = {name: deque(recent, maxlen=_RECENT) for name, (_, recent) in state.items()}
