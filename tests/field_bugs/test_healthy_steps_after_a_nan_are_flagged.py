"""One NaN in the window of OLMo-core's step skipping, and 129 of the next 200 healthy steps are skipped."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.rules.series import noise
from traindiag.playback.series import replay_series


@pytest.mark.parametrize("at", [0, 3, 20, 150])
def test_the_steps_after_it_are_judged_as_if_it_had_not_been(at: int) -> None:
    norms, losses = noise("independent", 360, 2, seed=4, sigma=0.1).T
    series = {"gradient/norm": norms, "loss/value": losses + 2}
    assert replay_series(series) == []
    broken = {name: np.insert(values, at, math.nan) for name, values in series.items()}
    assert {a.rule for a in replay_series(broken)} == {"nonfinite"}
