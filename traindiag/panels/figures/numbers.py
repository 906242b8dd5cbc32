"""Numbers for figures: short, strict, and with their extremes kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

DIGITS = 7
"""Significant digits: what a float32 holds."""


def listed(values: Floats) -> list[Any]:
    """Values as JSON takes them, nested as the array is: seven digits, None where they are not finite.

    Example:
        >>> listed(np.float32([0.1, np.nan, 1e-9, 12345.678, 0]))
        [0.1, None, 1e-09, 12345.68, 0.0]
    """
    wide = np.asarray(values, np.float64)
    there = np.isfinite(wide)
    safe = np.where(there & (wide != 0), wide, 1.0)
    scale = np.floor(np.log10(np.abs(safe)))
    # powers of ten beyond 1e308 overflow, so small numbers are scaled in two halves
    shift = DIGITS - 1 - scale
    half = np.floor(shift / 2)
    short = np.round(safe * 10.0**half * 10.0 ** (shift - half)) / 10.0 ** (shift - half) / 10.0**half
    rounded = np.where(wide == 0, 0.0, short)
    if there.all():
        return rounded.tolist()  # type: ignore[no-any-return]
    rounded = rounded.astype(object)
    rounded[~there] = None
    return rounded.tolist()  # type: ignore[no-any-return]


def kind_of(value: float) -> str:
    """``NaN``, ``inf`` or ``-inf``."""
    return "NaN" if np.isnan(value) else "inf" if value > 0 else "-inf"


def envelope(values: Floats, bins: int) -> Ints:
    """Indices of the points to draw: of each of ``bins`` stretches the smallest and the largest, first and last ones.

    Few enough points are all kept. Non-finite values are no extremes; callers mark them by themselves.

    Example:
        >>> envelope(np.float64([0, 9, 1, 1, 1, -5, 1, 1]), 2).tolist()
        [0, 1, 4, 5, 7]
    """
    n = len(values)
    if n <= 2 * bins:
        return np.arange(n)
    there = np.flatnonzero(np.isfinite(values))
    if not there.size:
        return np.array([0, n - 1])
    edges = np.unique(np.linspace(0, n, bins + 1).astype(np.int64))
    starts = np.unique(np.searchsorted(there, edges[:-1]))
    starts = starts[starts < len(there)]
    kept = values[there].astype(np.float64)
    bin_of = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(kept))))
    low, high = np.minimum.reduceat(kept, starts), np.maximum.reduceat(kept, starts)
    first_low = _first(kept == low[bin_of], bin_of, len(starts))
    first_high = _first(kept == high[bin_of], bin_of, len(starts))
    return np.unique(np.concatenate([[0], there[first_low], there[first_high], [n - 1]]))


def _first(hit: Bools, bin_of: Ints, bins: int) -> Ints:
    """Index of the first hit of each bin, which has one."""
    found = np.flatnonzero(hit)
    at = np.full(bins, -1, np.int64)
    at[bin_of[found][::-1]] = found[::-1]
    return at


def stretches(flags: Bools) -> list[tuple[int, int]]:
    """First and last index of each run of True.

    Example:
        >>> stretches(np.array([True, True, False, True]))
        [(0, 1), (3, 3)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2])]


class Columns:
    """Samples gathered into at most ``most`` columns of a heat map, each with the worst of what it stands for.

    Args:
        steps: ``[n]``.
        most: Columns at most.
    """

    def __init__(self, steps: Ints, most: int) -> None:
        n = len(steps)
        count = min(n, most)
        self.starts = np.unique(np.linspace(0, n, count + 1).astype(np.int64))[:-1] if n else np.empty(0, np.int64)
        ends = np.append(self.starts[1:], n) - 1 if n else self.starts
        self.first, self.last = steps[self.starts], steps[ends]

    @property
    def whole(self) -> bool:
        """Whether each sample has a column of its own."""
        return bool((self.first == self.last).all())

    def worst(self, values: Floats, seen: Bools, end: str) -> tuple[Floats, Floats]:
        """Worst finite value and one non-finite value of each column.

        Args:
            values: ``[n, rows]``.
            seen: ``[n, rows]``.
            end: ``max`` or ``min``.

        Returns:
            Two arrays ``[columns, rows]``: NaN in the first where no finite value was seen, 0 in the second where no
            non-finite one was.
        """
        if not len(self.starts):
            return np.empty((0, values.shape[1])), np.empty((0, values.shape[1]))
        there = seen & np.isfinite(values)
        away = -np.inf if end == "max" else np.inf
        reduce = np.maximum if end == "max" else np.minimum
        best = reduce.reduceat(np.where(there, values, away).astype(np.float64), self.starts, axis=0)
        best = np.where(np.isinf(best), np.nan, best)
        bad = seen & ~there
        if not bad.any():
            return best, np.zeros_like(best)
        nan = np.logical_or.reduceat(bad & np.isnan(values), self.starts, axis=0)
        positive = np.logical_or.reduceat(bad & (values == np.inf), self.starts, axis=0)
        negative = np.logical_or.reduceat(bad & (values == -np.inf), self.starts, axis=0)
        return best, np.where(nan, np.nan, np.where(positive, np.inf, np.where(negative, -np.inf, 0.0)))
