"""What the loss alone would have told, against the same rules written the slow way."""

from __future__ import annotations

import math
import statistics
from collections import deque

import numpy as np
import pytest

from tests.panels.logs import history
from traindiag.panels.report.loss import loss_story, risen, six_sigma
from traindiag.record.cells import Cells


def published(losses: list[float]) -> list[int]:
    """The rule as a loop over values, from its description."""
    past: deque[float] = deque(maxlen=128)
    found, spoke = [], False
    for i, loss in enumerate(losses):
        speaks = False
        if len(past) == 128 and not any(math.isnan(x) for x in past) and not any(math.isinf(x) for x in past):
            mean, deviation = statistics.fmean(past), statistics.pstdev(past)
            speaks = deviation >= 1e-10 and loss > mean + 6 * deviation
        if speaks and not spoke:
            found.append(i)
        spoke = speaks
        past.append(loss)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_six_sigma_rule_is_the_published_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = 3 + 0.1 * rng.standard_t(3, 900)
    losses[[200, 201, 400, 650]] = [6.0, 7.0, np.nan, np.inf]
    assert six_sigma(losses).tolist() == published(losses.tolist())
    assert len(six_sigma(losses)) > 0


def test_a_loss_too_short_or_flat_is_not_judged() -> None:
    assert six_sigma(np.r_[np.ones(100), 50.0]).size == 0
    assert six_sigma(np.r_[np.ones(200), 50.0]).size == 0


@pytest.mark.parametrize("noise", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("steps", [200, 5000])
def test_a_loss_that_falls_has_shown_nothing(noise: float, steps: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert risen(4 * np.exp(-np.arange(steps) / (steps / 8)) + 2 + rng.normal(0, noise, steps)) is None
        assert risen(2 + rng.normal(0, noise, steps)) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_step_up_is_found_where_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = 4 * np.exp(-np.arange(1000) / 125) + 2 + rng.normal(0, 0.1, 1000)
    losses[600:] += 1.5
    assert risen(losses) == 600


def test_an_odd_batch_is_no_trend() -> None:
    losses = 4 * np.exp(-np.arange(1000) / 125) + 2
    losses[500:505] += 5
    assert risen(losses) is None


def test_every_optimizer_counts() -> None:
    losses = 4 * np.exp(-np.arange(1000) / 125) + 2
    losses[700:] += 2
    table = np.stack([losses, np.full(1000, 1.0)], axis=1)
    table[800, 1] = np.nan
    cells = Cells.along("optimizer", ["a", "b"])
    series = history({"loss/value": (range(0, 2000, 2), cells, table)})["loss/value"]
    story = loss_story(series)
    assert story is not None
    assert (story.steps, story.risen, story.nonfinite) == (1000, 1400, 1600)
    assert loss_story(None) is None
