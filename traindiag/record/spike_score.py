"""How spiky a curve was, as one number to compare runs by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traindiag.record.series import Series

WINDOW = 1000
SIGMAS = 7.0
LEAST = 128
"""Values before one is judged; a shorter past knows no deviation of seven sigma."""


def spike_score(values: NDArray[np.floating], window: int = WINDOW, sigmas: float = SIGMAS) -> float:
    """Share of the values that stand ``sigmas`` standard deviations away from the mean of the ``window`` before.

    A value that is not finite counts as a spike and enters no mean. Good runs of OLMo 2 had 0.0003 to 0.0009 on the
    gradient norm, bad ones 0.001 to 0.004.

    Args:
        values: ``[n]``, one a step.
        window: Values looked back.
        sigmas: Standard deviations that make a spike.

    Returns:
        Between 0 and 1; NaN where fewer than 128 values came before any of them.

    References:
        OLMo 2, arXiv 2501.00656 section 3.

    Example:
        >>> calm = np.random.default_rng(0).normal(3.0, 0.1, 1128)
        >>> calm[500] = 9.0
        >>> spike_score(calm)
        0.001
    """
    x = np.asarray(values, np.float64)
    finite = np.isfinite(x)
    centre = float(np.median(x[finite])) if finite.any() else 0.0  # sums of squares lose nothing to a large mean
    known = np.where(finite, x - centre, 0.0)
    count, total, square = (np.concatenate([[0.0], np.cumsum(v)]) for v in (finite, known, known**2))
    end = np.arange(len(x))
    start = np.maximum(0, end - window)
    n = count[end] - count[start]
    judged = n >= LEAST
    if not judged.any():
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (total[end] - total[start]) / n
        spread = np.sqrt(np.maximum((square[end] - square[start]) / n - mean**2, 0.0))
        away = np.abs(x - centre - mean) > sigmas * spread
    return float((judged & (away | ~finite)).sum() / judged.sum())


def spike_scores(series: Series) -> dict[str, float]:
    """Of each cell of a signal, by its label; those too short to tell are left out."""
    found = {}
    for i, cell in enumerate(series.cells):
        score = spike_score(series.values[:, i][series.seen[:, i]])
        if score == score:
            found[str(cell)] = score
    return found
