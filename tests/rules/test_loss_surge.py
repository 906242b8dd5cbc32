"""A third of what was learned, given back at once."""

import math

import numpy as np
import pytest

from tests.rules.frames import active_at, feed
from traindiag.rules.loss_surge import LossSurge

LEARNING = list(np.linspace(6.0, 2.4, 20))
CALM = [2.4, 2.5, 2.3] * 10


def told(series: list[float]) -> list[int]:
    return active_at(feed(LossSurge(), series, "loss/value"))


def test_one_batch_is_told_at_its_step_and_is_over_at_the_next() -> None:
    said = feed(LossSurge(), [*LEARNING, *CALM, 4.5, 2.4], "loss/value")
    assert active_at(said) == [50]
    assert said[51] is not None and not said[51].active and "back at 2.4" in said[51].evidence


def test_noise_is_no_surge_however_little_was_learned() -> None:
    rng = np.random.default_rng(0)
    noise = (3.0 + rng.normal(0, 0.4, 400)).tolist()
    assert told([4.2, 4.1, 4.2, *noise]) == []  # a third of 1.2 is one deviation


def test_a_loss_near_zero_may_jump_a_hundredfold() -> None:
    assert told([2.3] * 5 + [0.01, 0.02, 0.004] * 20 + [0.5]) == []
    assert told([2.3] * 5 + [0.01, 0.02, 0.004] * 20 + [5.0]) == [65]


def test_a_surge_is_no_measure_for_what_follows_until_it_is_the_new_normal() -> None:
    at = told([*LEARNING, *CALM, *[5.0] * 80])
    assert at == list(range(50, 100))


@pytest.mark.parametrize("series", [[1.0] * 60 + [9.0], [-1.0] * 60 + [4.0], [1.0, 2.0, 3.0] * 20 + [30.0]])
def test_a_run_that_has_learned_nothing_is_not_judged(series: list[float]) -> None:
    assert told(series) == []


def test_nan_is_left_to_others_and_enters_nothing() -> None:
    series = [*LEARNING, *CALM]
    series[25:28] = [math.nan, math.inf, math.nan]
    assert told([*series, 4.5]) == [50]


def test_losses_below_zero_that_fall_are_judged_by_what_was_learned() -> None:
    assert told([*np.linspace(2.0, -3.0, 20), *[-3.0, -3.1, -2.9] * 10, 0.0]) == [50]
