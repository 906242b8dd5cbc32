"""msProbe's turbulence rule keeps a moving average: one NaN in it, and the tag is silent for good."""

from __future__ import annotations

import math

import pytest

from tests.rules.frames import active_at, feed
from traindiag.rules.forecast import Forecast
from traindiag.rules.rule import Rule
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold


@pytest.mark.parametrize(
    "rule", [Threshold("user/x", above=50.0), Spike("user/x"), Forecast("user/x", limit=1e4)], ids=lambda r: r.name
)
def test_what_comes_long_after_a_nan_is_told(rule: Rule) -> None:
    grows = [2.0 * 1.1**i for i in range(90)]
    series = [math.nan, 1.0, math.nan, *[1.0] * 200, math.nan, 60.0, 1.0, *grows]
    said = active_at(feed(rule, series, every=10))
    assert said[-1] >= 204
