"""The outlier enters the mean and deviation that it is judged by, and hides the next one as well."""

from __future__ import annotations

import numpy as np

from tests.rules.frames import active_at, feed
from traindiag.rules.spike import Spike

NOISE = 1 + 0.05 * np.random.default_rng(0).standard_normal(400)


def test_a_second_spike_after_a_first_one_is_told_too() -> None:
    series = NOISE.copy()
    series[[200, 230, 260]] = 1e3, 12.0, 12.0
    told = active_at(feed(Spike("gradient/norm"), series.tolist(), "gradient/norm"))
    assert {200, 230, 260} <= set(told)


def test_a_jump_out_of_a_short_history_is_told() -> None:
    series = [*NOISE[:50], 12.0]
    assert 50 in active_at(feed(Spike("gradient/norm"), series, "gradient/norm"))
