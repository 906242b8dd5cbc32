"""Whether a message tells of anything that cannot wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

CALM = 2.0
"""A sum that is at most this many times its level is calm, and a sum of squares at most the square of it: norms may
double too."""

_SHARE = 1 / 8
"""Of each new value in the level: it follows a young run, whose gradient norm may halve in eight steps."""


class Screen:
    """Holds the totals of a message against their recent level, before anything is unpacked.

    A message stirs when a total is not finite, has left its level by more than that level (three times that level
    where its name ends with ``squares``), or was zero and no longer is. Otherwise it may be judged a few steps later,
    together with others. What it has seen
    decides nothing else. All ranks hold the same reduced numbers, so they agree.

    Example:
        >>> screen = Screen()
        >>> screen.lay_out([("loss:total", 1), ("gradient:squares", 2)])
        >>> steps = [2.0, 1.0, 4.0], [2.1, 3.0, 4.0], [1.9, 90.0, 4.0], [2.0, float("nan"), 1.0]
        >>> [screen.stirs(step) for step in steps]
        [True, False, True, True]
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._ends: list[int] = []
        self._levels: list[float] = []
        self._reach: list[float] = []
        self._known: dict[str, float] = {}

    def lay_out(self, totals: Sequence[tuple[str, int]]) -> None:
        """Takes the name and the length of each total's part of a message, in order; levels stay with their names."""
        self._known = self.state_dict()
        self._names = [name for name, _ in totals]
        self._ends = list(accumulate(length for _, length in totals))
        self._levels = [self._known.get(name, math.nan) for name in self._names]
        self._reach = [(CALM**2 if name.endswith("squares") else CALM) - 1 for name in self._names]

    def stirs(self, numbers: Sequence[float]) -> bool:
        """Takes the numbers of one message, each message once.

        They come as floats: right after a training step caches are cold, and the interpreter, which has just run it,
        is faster than arrays.
        """
        found, start, levels = not self._levels, 0, self._levels
        for i, end in enumerate(self._ends):
            total, level = sum(numbers[start:end]), levels[i]
            start = end
            if total == level:  # most totals are counts
                continue
            away, calm = total - level, self._reach[i] * abs(level)
            if abs(away) <= calm:
                levels[i] = level + _SHARE * away
                continue
            found = True  # of NaN and infinity too
            if level != level:
                levels[i] = total if math.isfinite(total) else level
            elif math.isfinite(total):  # no outlier moves the level more than what is barely calm: none hides another
                levels[i] = level + _SHARE * (math.copysign(calm, away) if level else away)
        return found

    def state_dict(self) -> dict[str, float]:
        """Levels by name."""
        return {**self._known, **{n: v for n, v in zip(self._names, self._levels) if v == v}}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continues where :meth:`state_dict` was taken, whatever the layout is by now."""
        self._known = {str(name): float(value) for name, value in state.items()}
        self._levels = [self._known.get(name, math.nan) for name in self._names]
