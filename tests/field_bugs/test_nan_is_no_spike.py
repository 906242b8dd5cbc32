"""KillLossSpike compares with a mean: a loss that is NaN is not twice anything, and is never told."""

from __future__ import annotations

import math

import pytest

from traindiag.playback.series import replay_series


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signal", ["loss/value", "gradient/norm", "output/log_z_max_abs", "activation/rms"])
def test_it_is_told_at_its_own_step_as_critical(signal: str, bad: float) -> None:
    series = [2.0 + 0.01 * (i % 3) for i in range(60)]
    series[40] = bad
    alerts = replay_series({signal: series})
    assert [(a.step, a.rule, a.severity) for a in alerts] == [(40, "nonfinite", "critical")]
