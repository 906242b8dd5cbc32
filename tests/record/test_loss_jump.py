"""The detector of jumps: quick where data changes, silent on losses that fall, and the same after a resume."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traindiag.record.loss_jump import LossJump


def falling(seed: int, steps: int = 2000) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    found: NDArray[np.float64] = 1.5 + 3 * np.exp(-np.arange(steps) / 150) + rng.normal(0, 0.08, steps)
    return found


def jumps(losses: NDArray[np.float64], detector: LossJump | None = None) -> list[int]:
    detector = detector or LossJump()
    return [i for i, loss in enumerate(losses) if detector.push(float(loss))]


def reference(losses: NDArray[np.float64]) -> list[int]:
    """The same test by whole-history sums: weights of the exponential means are written out at every step."""
    found, begin, total = [], 0, 0.0
    for n, x in enumerate(losses):
        past = losses[begin:n]
        if len(past) >= 30:
            weights = np.ones(0)
            for k in range(1, len(past) + 1):
                alpha = max(1 - 0.5 ** (1 / 50), 1 / k)
                weights = np.append(weights * (1 - alpha), alpha)
            mean = float(weights @ past)
            deviation = float(np.sqrt(weights @ (past - mean) ** 2))
            total = max(0.0, total + min((x - mean) / deviation, 10.0) - 0.5)
            if total > 8:
                found.append(n)
                begin, total = n + 1, 0.0
    return found


def test_it_is_the_test_of_page_and_hinkley_on_exponential_scores() -> None:
    losses = falling(0, 400)
    losses[200:] += 1.5
    losses[300:] += 0.5
    assert jumps(losses) == reference(losses) != []


def test_a_change_of_data_is_told_at_once_and_falling_is_not() -> None:
    for seed in range(5):
        losses = falling(seed)
        assert jumps(losses) == []
        losses[1000:] += 0.6
        first = jumps(losses)[0]
        assert 1000 <= first <= 1001


def test_what_is_not_finite_counts_for_nothing() -> None:
    losses = falling(1, 500)
    holes = losses.copy()
    holes[100], holes[101] = np.nan, np.inf
    assert jumps(holes) == []


def test_a_state_goes_on() -> None:
    losses = falling(2, 600)
    losses[400:] += 0.8
    whole = jumps(losses)
    first, second = LossJump(), LossJump()
    found = jumps(losses[:390], first)
    second.load_state_dict(first.state_dict())
    assert whole == found + [390 + i for i in jumps(losses[390:], second)] != []
