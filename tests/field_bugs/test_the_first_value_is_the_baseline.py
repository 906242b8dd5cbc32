"""msProbe's moving average begins at the first value, without a warm-up: a strange one sets off alarms."""

from __future__ import annotations

import pytest

from tests.field_bugs.pack import warnings
from tests.rules.series import noise
from traindiag.playback.series import replay_series

SIGNALS = ("loss/value", "gradient/norm", "activation/rms", "attention/query_norm", "output/log_z_max_abs")


@pytest.mark.parametrize("first", [1e-6, 1e6])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_strange_first_value_is_no_measure(signal: str, first: float) -> None:
    values = 20 * noise("independent", 300, 1, seed=2, sigma=0.1)[:, 0]
    values[0] = first
    others = {"output/target_z_score": [2.0] * 300, "output/log_z": [5.0] * 300}
    assert warnings(replay_series({signal: values, **others})) == []
