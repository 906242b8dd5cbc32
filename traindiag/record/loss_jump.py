"""A training loss that is suddenly higher than it was: the sign of other data, found as it happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

HALF_LIFE = 50
"""Steps in which what was seen loses half of its weight."""

DELTA, LIMIT = 0.5, 8.0
"""Standard deviations that are let pass each step, and their sum beyond which the loss has jumped."""

CLIP = 10.0
"""Largest score of one step."""

WARM_UP = 30
"""Steps that the first mean and deviation are made of."""


class LossJump:
    """One-sided test of Page and Hinkley on the standard scores of a stream that usually falls.

    A score is a value's distance from the exponential mean of those before it, in their exponential standard
    deviation, cut off at 10. What scores exceed 0.5 by adds up, never below zero, and beyond 8 the stream has jumped:
    so one value nine deviations above the mean will do, and so will six by two. After a jump everything is learned
    anew. What is not finite is left out.

    :class:`~traindiag.rules.shift.Shift` judges signals that have a level: it learns one, once, from a robust window.
    A training loss has none, it falls; here the mean follows it, so that only a rise stands out.

    References:
        E. S. Page, Continuous inspection schemes, Biometrika 41, 1954; D. V. Hinkley, Inference about the
        change-point from cumulative sum tests, Biometrika 58, 1971.

    Example:
        >>> jump = LossJump()
        >>> losses = [2.0 + 0.1 * (i % 3) for i in range(60)] + [3.2]
        >>> [i for i, loss in enumerate(losses) if jump.push(loss)]
        [60]
    """

    def __init__(self) -> None:
        self._mean = self._variance = self._sum = 0.0
        self._count = 0

    def push(self, value: float) -> bool:
        """Takes the next value; whether it makes a jump."""
        if not math.isfinite(value):
            return False
        if self._count >= WARM_UP:
            deviation = max(math.sqrt(self._variance), 1e-6 * abs(self._mean), 1e-30)
            self._sum = max(0.0, self._sum + min((value - self._mean) / deviation, CLIP) - DELTA)
            if self._sum > LIMIT:
                self.forget()
                return True
        self._count += 1
        weight = max(1.0 - 0.5 ** (1.0 / HALF_LIFE), 1.0 / self._count)
        away = value - self._mean
        self._mean += weight * away
        self._variance = (1.0 - weight) * (self._variance + weight * away * away)
        return False

    def forget(self) -> None:
        """Learns anew: the stream is another one."""
        self._mean = self._variance = self._sum = 0.0
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "variance": self._variance, "sum": self._sum, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._variance = float(state["mean"]), float(state["variance"])
        self._sum, self._count = float(state["sum"]), int(state["count"])
