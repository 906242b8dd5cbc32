"""The spike score against a plain loop."""

import math

import numpy as np
import pytest

from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.record.series import History
from traindiag.record.spike_score import LEAST, spike_score, spike_scores


def slowly(values: list[float], window: int, sigmas: float) -> float:
    spikes = judged = 0
    for i, value in enumerate(values):
        past = [v for v in values[max(0, i - window) : i] if math.isfinite(v)]
        if len(past) < LEAST:
            continue
        judged += 1
        mean = sum(past) / len(past)
        spread = math.sqrt(sum((v - mean) ** 2 for v in past) / len(past))
        spikes += not math.isfinite(value) or abs(value - mean) > sigmas * spread
    return spikes / judged if judged else math.nan


@pytest.mark.parametrize("window", [200, 1000])
def test_against_a_loop(window: int) -> None:
    rng = np.random.default_rng(window)
    values = 1e4 + np.cumsum(rng.normal(0, 0.1, 900)) + rng.normal(0, 1, 900)
    values[[300, 301, 500]] += 60
    values[[400, 700]] = np.nan, np.inf
    assert spike_score(values, window) == pytest.approx(slowly(values.tolist(), window, 7.0))
    assert spike_score(values, window) > 4 / 900


def test_a_short_run_has_none_and_a_flat_one_has_no_spikes() -> None:
    assert math.isnan(spike_score(np.ones(LEAST)))
    assert spike_score(np.ones(LEAST + 50)) == 0.0


def test_cells_by_name() -> None:
    history = History()
    cells = Cells.along("optimizer", ["a", "b"])
    for step in range(400):
        values = np.float32([1 + step % 2, 1 + step % 2 + 99 * (step == 300)])
        history.add(step, Reading(BY_NAME["gradient/norm"], cells, values, np.array([True, step < 350])))
    assert spike_scores(history["gradient/norm"]) == {"a": 0.0, "b": pytest.approx(1 / (350 - LEAST))}
