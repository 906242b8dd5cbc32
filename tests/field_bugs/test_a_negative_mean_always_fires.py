"""More than so many times the mean is true of everything where the mean is negative, as of the loss of a density."""

from __future__ import annotations

import numpy as np
import pytest

from tests.rules.frames import active_at, feed
from traindiag.playback.series import replay_series
from traindiag.rules.shift import Shift

LOSS = -3 + 0.2 * np.random.default_rng(0).standard_normal(400)


@pytest.mark.parametrize("loss", [LOSS, 5 * np.exp(-np.arange(400) / 40) + LOSS])
def test_a_loss_below_zero_or_through_it_is_left_alone(loss: np.ndarray) -> None:
    assert replay_series({"loss/value": loss, "logged/elbo": loss}) == []


def test_and_its_jump_is_told_where_it_is_asked_for() -> None:
    said = feed(Shift("loss/value", logarithm=False), [*LOSS[:300], *(LOSS[300:] + 4)], "loss/value")
    assert 300 <= active_at(said)[0] <= 306
