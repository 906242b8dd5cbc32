"""Trained models hold a few activations thousands of times larger than the rest, from their first blocks to their
last and in every step: limits on maxima and kurtosis take them for a fault.
"""

from __future__ import annotations

import numpy as np

from tests.field_bugs.pack import warnings
from tests.rules.series import noise
from traindiag.playback.series import replay_series

LAYERS, WIDTH, STEPS = 24, 4096, 60


def test_what_is_constant_is_left_alone() -> None:
    usual = 0.1 * np.exp(np.linspace(0, 2, LAYERS))
    massive = np.where(np.arange(LAYERS) >= 2, 2000.0, 3.0)
    rms = np.sqrt(usual**2 + massive**2 / WIDTH)
    wobble = noise("AR(0.9)", STEPS, LAYERS, seed=1, sigma=0.05)
    alerts = replay_series(
        {
            "activation/rms": rms * wobble,
            "activation/max": massive * wobble,
            "activation/kurtosis": np.minimum(WIDTH, massive**2 / usual**2) * wobble,
            "activation/growth_exponent": np.log(rms[-1] / rms[0]) / LAYERS * wobble[:, :1],
            "attention/max_logit": 40 * wobble,
            "output/log_z": 12 * wobble[:, :1],
        },
        every=10,
    )
    assert warnings(alerts) == []
