"""A mean that moves along never sees a slow climb: a loss that goes from 2 to 9.9 in 2000 steps is not told."""

from __future__ import annotations

import numpy as np

from tests.rules.frames import active_at, feed
from traindiag.rules.growth import Growth
from traindiag.rules.trend import Trend


def test_it_is_told_before_half_of_it_is_over() -> None:
    loss = np.geomspace(2, 9.9, 2000) + 0.05 * np.random.default_rng(0).standard_normal(2000)
    for rule in (Trend("loss/value", growth_per_1000=1.5), Growth("loss/value", factor=2.0, samples=50)):
        assert active_at(feed(rule, loss.tolist(), "loss/value"))[0] < 1000
