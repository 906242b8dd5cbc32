"""Only twice the mean of a window, five times in a row, is a spike to KillLossSpike: a loss that jumps from 2.0 to
3.9 for good is never told, and one that jumps to 4.2 five steps late.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.field_bugs.pack import rule
from tests.rules.frames import active_at, feed


@pytest.mark.parametrize("after", [3.9, 4.2])
def test_it_is_told_at_its_own_step(after: float) -> None:
    steps = np.arange(1200)
    loss = 2 + 9 * np.exp(-steps / 150) + 0.05 * np.random.default_rng(0).standard_normal(1200)
    loss[1000:] += after - 2
    assert active_at(feed(rule("loss/spike"), loss.tolist(), "loss/value"))[:1] == [1000]
