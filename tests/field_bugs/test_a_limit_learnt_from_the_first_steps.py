"""Megatron's rerun machine takes ten times the largest of the first 100 values for its limit, and those of a young
run are the largest of all: what jumps later stays below.
"""

from __future__ import annotations

import numpy as np

from tests.field_bugs.pack import rule
from tests.rules.frames import active_at, feed


def test_a_jump_far_below_the_first_values_is_told() -> None:
    norm = 0.2 + 50 * np.exp(-np.arange(600) / 40) * np.exp(0.1 * np.random.default_rng(0).standard_normal(600))
    norm[500] = 5.0
    assert norm[:100].max() * 10 > 50 * norm[500]
    assert active_at(feed(rule("gradient/norm-spike"), norm.tolist(), "gradient/norm")) == [500]
