"""When the slow lane samples: a cadence, bursts when something stirs, back-off when it costs too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

BURST_LENGTH = 20
BURST_SPACING = 500
_MAX_STRETCH = 64
EARLY = (0, 1, 9, 99)
"""Steps that count for what is wrong from the start, or right for good: the 1st, 2nd, 10th and 100th one."""


class Schedule:
    """Decides from the step, checkpointed state and numbers that all ranks share, so that ranks cannot disagree.

    Args:
        every: Cadence in steps.
        max_overhead: Largest share of the step time that the monitors may take, or None.

    Raises:
        ValueError: If ``every`` is not a positive whole number or ``max_overhead`` is not a share.

    Example:
        >>> schedule = Schedule(every=10)
        >>> [step for step in range(25) if schedule.due(step)]
        [0, 10, 20]
    """

    def __init__(self, every: int, max_overhead: float | None = None) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every_n_steps must be a whole number of at least 1, got {every!r}")
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ValueError(f"max_overhead must be a share between 0 and 1, or None; got {max_overhead!r}")
        self.every = every
        self.max_overhead = max_overhead
        self.lean = False
        """Whether costly monitors of the fast lane are left to the samples, because every step costs too much."""
        self._stretch = 1
        self._burst_from = -BURST_SPACING

    @property
    def cadence(self) -> int:
        """Steps between samples now, back-off included."""
        return self.every * self._stretch

    def due(self, step: int) -> bool:
        """Whether ``step`` is sampled on the slow lane."""
        return step % self.cadence == 0 or self._burst_from <= step < self._burst_from + BURST_LENGTH

    def early(self, step: int) -> bool:
        """Whether ``step`` is one of the first ones at which monitors that ask for it look, sampled or not.

        Example:
            >>> [step for step in range(200) if Schedule(every=10).early(step)]
            [0, 1, 9, 99]
        """
        return step in EARLY

    def open_burst(self, step: int) -> bool:
        """Samples every step from ``step`` on for a while, at most once in 500 steps."""
        if step < self._burst_from + BURST_SPACING:
            return False
        self._burst_from = step
        return True

    def account(self, fast: float, slow: float) -> bool:
        """Doubles the cadence when diagnostics cost more than the budget, and relaxes later.

        Where every step alone takes more than half of it, costly monitors of the fast lane are left to the samples.
        Sampling less often saves only what samples cost: where the fast lane alone takes up the budget, samples may
        still have a quarter of it.

        Args:
            fast: Measured share of the step time of what is done every step; NaN while unknown.
            slow: Measured share of what samples add, at the present cadence.

        Returns:
            Whether the cadence changed.
        """
        if self.max_overhead is None or math.isnan(fast + slow):
            return False
        if fast > self.max_overhead / 2:
            self.lean = True
        elif fast < self.max_overhead / 8:
            self.lean = False
        allowed = max(self.max_overhead - fast, self.max_overhead / 4)
        before = self._stretch
        if slow > allowed and self._stretch < _MAX_STRETCH:
            self._stretch *= 2
        elif slow < allowed / 4 and self._stretch > 1:
            self._stretch //= 2
        return self._stretch != before

    def state_dict(self) -> dict[str, Any]:
        return {"stretch": self._stretch, "burst_from": self._burst_from, "lean": self.lean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stretch, self._burst_from = int(state["stretch"]), int(state["burst_from"])
        self.lean = bool(state.get("lean", False))
