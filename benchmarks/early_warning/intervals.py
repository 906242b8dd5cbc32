"""Intervals of what was counted: exact ones, and a bootstrap over configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, chi2

_RESAMPLES = 2000


def clopper_pearson(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share.

    Example:
        >>> [round(x, 4) for x in clopper_pearson(3, 400)]
        [0.0015, 0.0218]
    """
    if not of:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, of - hits + 1))
    high = 1.0 if hits == of else float(beta.ppf(1 - tail, hits + 1, of - hits))
    return low, high


def poisson_upper(events: int, level: float = 0.95) -> float:
    """Exact upper end of the two-sided interval of a count.

    Example:
        >>> round(poisson_upper(0), 3), round(poisson_upper(6), 2)
        (3.689, 13.06)
    """
    return float(chi2.ppf(1 - (1 - level) / 2, 2 * (events + 1)) / 2)


def clustered(tops: Sequence[float], bottoms: Sequence[float], clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of ``sum(tops) / sum(bottoms)`` by a bootstrap over clusters, which keeps what is alike together.

    Args:
        tops: One a run.
        bottoms: One a run, positive.
        clusters: What each run belongs to, such as its configuration.

    Example:
        >>> clustered([1, 1, 1, 1], [2, 2, 2, 2], "abcd")
        (0.5, 0.5)
    """
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums: NDArray[np.float64] = np.zeros((len(place), 2))
    for top, bottom, cluster in zip(tops, bottoms, clusters, strict=True):
        sums[place[cluster]] += (top, bottom)
    drawn = sums[np.random.default_rng(0).integers(0, len(sums), (_RESAMPLES, len(sums)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return float(low), float(high)
