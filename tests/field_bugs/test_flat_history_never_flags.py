"""OLMo-core raises no alarm while the window's deviation is below 1e-10: a jump out of a flat line is not told."""

from __future__ import annotations

from tests.rules.frames import active_at, feed
from traindiag.rules.spike import Spike


def test_a_jump_out_of_a_constant_is_told() -> None:
    assert active_at(feed(Spike("gradient/norm"), [1.0] * 128 + [1e6], "gradient/norm")) == [128]
