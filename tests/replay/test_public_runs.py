"""What the default pack says to the published rows of runs that spiked, as it is; nothing here was tuned to it.

The published excerpts begin one row before the spike, so each is also judged after a past that is made up: 200 steps
of log-normal noise around the gradient norm of its first row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from traindiag import replay, replay_series
from traindiag.playback.replay import ReplayedRun

FIXTURES = Path(__file__).parents[1] / "fixtures"


def published(name: str) -> ReplayedRun:
    (run,) = replay(FIXTURES / f"{name}.csv").runs
    return run


def told(run: ReplayedRun) -> list[tuple[int, str]]:
    return [(a.step, a.severity) for a in run.alerts if a.status != "closed"]


def after_a_past(name: str, sigma: float, seed: int) -> list[tuple[int, str]]:
    norm = published(name).history["gradient/norm"]
    first, rows = int(norm.steps[0]), dict(zip(norm.steps.tolist(), norm.values[:, 0].tolist()))
    noise = np.exp(sigma * np.random.default_rng(seed).normal(size=200))
    past = {first - 200 + i: float(rows[first] * x) for i, x in enumerate(noise)}
    return [(a.step, a.severity) for a in replay_series({"gradient/norm": {**past, **rows}}) if a.status != "closed"]


def test_the_rows_are_those_that_were_published() -> None:
    run = published("bloom_176b_first_loss_spike")
    loss, norm = run.history["loss/value"], run.history["gradient/norm"]
    assert int(loss.steps[loss.values[:, 0].argmax()]) == 31219
    assert norm.values[norm.steps == 31219, 0] == np.float32(960.351)


def test_bloom_176b_alone() -> None:
    """With one row before it, a spike has four values to be held against at 31218, one step before the loss.

    The loss is its second witness, and makes a warning of the note.
    """
    run = published("bloom_176b_first_loss_spike")
    assert [(a.step, a.severity, a.signal) for a in run.alerts if a.status != "closed"] == [
        (31218, "info", "gradient/norm"),
        (31219, "warning", "loss/value"),
    ]


@pytest.mark.parametrize("sigma", [0.0, 0.15, 0.35])
def test_bloom_176b_after_a_past(sigma: float) -> None:
    """Noted three or four steps before the loss (31219); a warning one or two before, as the norm keeps climbing."""
    for seed in range(10):
        (noted, note), (warned, warning) = after_a_past("bloom_176b_first_loss_spike", sigma, seed)
        assert noted in (31215, 31216) and note == "info"
        assert warned in (31217, 31218) and warning == "warning"


def test_104b_alone() -> None:
    """Three rows are too few for any rule."""
    assert told(published("tr8_104b_experiment_11")) == []


@pytest.mark.parametrize("sigma", [0.0, 0.15, 0.35])
def test_104b_after_a_past(sigma: float) -> None:
    """At the step of the jump, one before the loss (11448), as a note."""
    for seed in range(10):
        assert after_a_past("tr8_104b_experiment_11", sigma, seed) == [(11447, "info")]


def test_healthy_weeks_are_silent() -> None:
    run = published("bloom_176b_healthy")
    assert run.steps == 6 and run.alerts == ()
