"""A detector that only compares upwards (value > mean x k) never tells of a signal that collapses to zero."""

from __future__ import annotations

from tests.rules.frames import active_at, feed
from traindiag.rules.threshold import Threshold


def test_a_gradient_that_vanishes_is_told() -> None:
    said = feed(Threshold("gradient/norm", below=1e-6, persistence=3), [1.0] * 20 + [0.0] * 5, "gradient/norm")
    assert active_at(said) == [22, 23, 24]
