"""Straight lines through many short series at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# One-sided 90 % points of Student's t for 1, 2, ... degrees of freedom; they end near the normal 1.28.
_T90 = np.array([3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.356, 1.341, 1.325, 1.310])
_T90_AT = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30])


class Lines(NamedTuple):
    """Least-squares lines, one a cell. Every field is ``[n]``; NaN where two distinct points are missing.

    Args:
        slope: Per unit of ``x``.
        x_mean: Centre of the points.
        y_mean: Height there.
        fit: Share of the variance explained (R squared).
        error: Standard deviation of the residuals.
        x_spread: Sum of squared distances from the centre.
        points: How many.
    """

    slope: Floats
    x_mean: Floats
    y_mean: Floats
    fit: Floats
    error: Floats
    x_spread: Floats
    points: NDArray[np.int64]

    def crossing(self, level: float) -> tuple[Floats, Floats, Floats]:
        """Where the lines reach ``level``: low, mid and high, an 80 % interval by the delta method."""
        mid = self.x_mean + (level - self.y_mean) / self.slope
        t90 = np.interp(self.points - 2, _T90_AT, _T90)
        leverage = 1 / self.points + (mid - self.x_mean) ** 2 / self.x_spread
        half = t90 * self.error / np.abs(self.slope) * np.sqrt(leverage)
        return mid - half, mid, mid + half


def fit_lines(x: Floats, y: Floats) -> Lines:
    """Fits each column of ``y``.

    Args:
        x: ``[m]``, shared by all cells.
        y: ``[m, n]``; NaN where a cell has no point.

    Example:
        >>> lines = fit_lines(np.array([0.0, 1.0, 2.0]), np.array([[1.0], [3.0], [5.0]]))
        >>> float(lines.slope[0]), float(lines.crossing(9.0)[1][0])
        (2.0, 4.0)
    """
    there = np.isfinite(y)
    weight = there.astype(np.float64)
    count = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        x_mean, y_mean = x @ weight / count, np.where(there, y, 0.0).sum(0) / count
        dx = np.where(there, x[:, None] - x_mean, 0.0)
        dy = np.where(there, y - y_mean, 0.0)
        x_spread, y_spread = (dx * dx).sum(0), (dy * dy).sum(0)
        slope = (dx * dy).sum(0) / x_spread
        rest = np.maximum(y_spread - slope * slope * x_spread, 0.0)
        fit = 1.0 - rest / y_spread
        error = np.sqrt(rest / np.maximum(count - 2, 1))
    return Lines(slope, x_mean, y_mean, fit, error, x_spread, count)


MOST_CARRIED = 0.95
"""Largest autocorrelation that is believed: beyond, a series of some tens of values says nothing of its level."""


def robust_spread(rest: Floats) -> Floats:
    """1.4826 times the median distance of each column of ``[m, n]`` from zero, NaN left out.

    Example:
        >>> robust_spread(np.array([[-1.0], [1.0], [np.nan], [2.0], [-1.0]])).round(2).tolist()
        [1.48]
    """
    spread: Floats = 1.4826 * np.nanmedian(np.abs(rest), axis=0)
    return spread


def carried_over(rest: Floats, removed: int) -> Floats:
    """How much of a deviation is left in the next one: the first autocorrelation of each column, 0 to 0.95.

    Deviations count as at most three robust ones, so that a lone jump decides nothing. Short series seem less
    correlated than they are, by ``(removed + 4 r) / m`` to the first order; that is put back.

    Args:
        rest: ``[m, n]``, what is left of a series without its level or line; NaN where there is nothing.
        removed: Parameters that were taken out: 1 for a level, 2 for a line.

    References:
        F. H. C. Marriott and J. A. Pope, Bias in the estimation of autocorrelations, Biometrika 41, 1954.
    """
    most = 3 * robust_spread(rest)
    rest = np.clip(rest, -most, most)
    both = np.isfinite(rest[1:]) & np.isfinite(rest[:-1])
    count = both.sum(0) + 1
    products, squares = rest[1:] * rest[:-1], rest * rest
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(both, products, 0.0).sum(0) / np.nansum(squares, axis=0)
        carried = (found * count + removed) / np.maximum(count - 4, 1)
    believed: Floats = np.clip(np.nan_to_num(carried, nan=0.0), 0.0, MOST_CARRIED)
    return believed
