"""OLMo-core's detectors go blind for a window after one NaN, which enters their mean and deviation."""

from __future__ import annotations

import math

from tests.rules.frames import active_at, feed
from traindiag.rules.spike import Spike


def test_a_jump_right_after_a_nan_is_told() -> None:
    series = [1.0, 1.1, 0.9] * 20
    assert active_at(feed(Spike("gradient/norm"), [*series, math.nan, 20.0], "gradient/norm")) == [61]
    assert active_at(feed(Spike("gradient/norm"), [*series, math.inf, 20.0], "gradient/norm")) == [61]
