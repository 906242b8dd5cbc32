"""When the loss itself showed that something is wrong: what a warning is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from traindiag.record.series import Series

SIGMAS = 6.0
WINDOW = 128
"""The rule on the loss that people use most: above the mean of the last 128 values by 6 of their standard deviations,
judged once the window is full. ``StabilityMonitor`` of OLMo-core."""

SMOOTH = 11
"""Values of a running median: a single odd batch is no trend."""
GIVEN_BACK = 0.1
"""Share of what was learned that a loss which shows its trouble has given back."""
NOISE = 8.0
"""Deviations of the running median that it must stand out by: over thousands of values chance alone spans six."""


@dataclass(frozen=True)
class LossStory:
    """What the loss alone would have told.

    Args:
        steps: Number of losses.
        nonfinite: Step of the first loss that is NaN or infinite.
        risen: Step from which on the smoothed loss stood above its lowest level by a tenth of what was learned, and
            by more than chance, and stayed there for twice as many values as it is smoothed over.
        six_sigma: Steps at which the 6-sigma rule spoke; consecutive ones are one.
    """

    steps: int
    nonfinite: int | None
    risen: int | None
    six_sigma: tuple[int, ...]


def loss_story(series: Series | None) -> LossStory | None:
    """Reads the loss of a run; with several optimizers the first cell that shows something counts.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.cells import Cells
        >>> series = Series(BY_NAME["loss/value"], Cells.along("optimizer", ["adam"]))
        >>> losses = np.float32([4 * 0.99**i + 1 for i in range(200)] + [4.0] * 40)[:, None]
        >>> series.extend(np.arange(240), series.cells, losses, np.isfinite(losses))
        >>> story = loss_story(series)
        >>> story.risen, story.six_sigma
        (200, ())
    """
    if series is None or not len(series) or not series.seen.any():
        return None
    stories = [
        _story(series.steps[seen], series.values[seen, i].astype(np.float64))
        for i in range(len(series.cells))
        if (seen := series.seen[:, i]).any()
    ]
    nonfinite = min((s.nonfinite for s in stories if s.nonfinite is not None), default=None)
    risen = min((s.risen for s in stories if s.risen is not None), default=None)
    spoke = sorted({step for s in stories for step in s.six_sigma})
    return LossStory(max(s.steps for s in stories), nonfinite, risen, tuple(spoke))


def _story(steps: NDArray[np.int64], losses: NDArray[np.float64]) -> LossStory:
    bad = np.flatnonzero(~np.isfinite(losses))
    good = np.isfinite(losses)
    rise = risen(losses[good])
    spoke = six_sigma(losses)
    return LossStory(
        len(losses),
        int(steps[bad[0]]) if bad.size else None,
        None if rise is None else int(steps[good][rise]),
        tuple(int(s) for s in steps[spoke]),
    )


def six_sigma(losses: NDArray[np.float64], window: int = WINDOW, sigmas: float = SIGMAS) -> NDArray[np.int64]:
    """Indices at which the rule begins to speak.

    As published, a NaN is no spike and silences the rule for as long as it stays in the window.

    Args:
        losses: ``[n]``.
        window: Values looked back.
        sigmas: Standard deviations (of the biased kind) above the mean.
    """
    n = len(losses)
    if n <= window:
        return np.empty(0, np.int64)
    finite = np.isfinite(losses)
    shifted = np.where(finite, losses - np.median(losses[finite]) if finite.any() else 0.0, 0.0)
    total, square, count = (np.concatenate([[0.0], np.cumsum(v)]) for v in (shifted, shifted**2, finite))
    ends = np.arange(window, n)
    mean = (total[ends] - total[ends - window]) / window
    spread = np.sqrt(np.maximum((square[ends] - square[ends - window]) / window - mean**2, 0.0))
    whole = count[ends] - count[ends - window] == window
    with np.errstate(invalid="ignore"):
        speaks = whole & (spread >= 1e-10) & finite[ends] & (shifted[ends] - mean > sigmas * spread)
    speaks |= whole & (losses[ends] == np.inf)
    begins = speaks & ~np.concatenate([[False], speaks[:-1]])
    return np.asarray(ends[begins], np.int64)


def risen(losses: NDArray[np.float64]) -> int | None:
    """Index from which on the smoothed loss stood above its lowest level, and stayed for twice :data:`SMOOTH` values.

    Args:
        losses: ``[n]``, finite.
    """
    hold = 2 * SMOOTH
    if len(losses) < SMOOTH + hold:
        return None
    smooth = np.median(sliding_window_view(losses, SMOOTH), axis=1)  # of the value at its end and those before
    lowest = np.minimum.accumulate(smooth)
    learned = np.maximum(smooth[0], losses[:3].max()) - lowest
    deviation = 1.4826 * float(np.median(np.abs(losses[SMOOTH - 1 :] - smooth)))
    noise = NOISE * 1.2533 * deviation / np.sqrt(SMOOTH)  # a median scatters pi / 2 times as much as a mean, squared
    level = lowest + np.maximum(GIVEN_BACK * learned, noise)
    stays = sliding_window_view(smooth - level, hold).min(axis=1) > 0
    if not stays.any():
        return None
    first = int(np.argmax(stays))
    # the median turns when half of its window has: look there for the first loss that is as high
    begin = first + SMOOTH // 2
    return begin + int(np.argmax(losses[begin : begin + SMOOTH] > level[first]))
