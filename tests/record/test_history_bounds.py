"""However long a run and however wide its readings, the history stays within its bounds and keeps the whole past."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.record.series import History
from traindiag.record.signal import Signal

KL = Signal("reward/kl", (), "kl")


def test_a_long_run_keeps_every_age_and_its_latest_steps_in_full():
    history = History(max_samples=512)
    for step in range(60_000):
        history.add(step, Reading.scalar(KL, float(step)))
    steps = history["reward/kl"].steps
    assert len(steps) <= 512
    assert steps[0] == 0
    assert steps[-20:].tolist() == list(range(59_980, 60_000))
    age = 59_999 - steps[:-1]
    # Gaps grow with age and no more: no stretch of the past is lost.
    assert (np.diff(steps) <= np.maximum(4, 0.15 * age)).all()
    assert history["reward/kl"].values[:, 0].tolist() == steps.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(50_000, 200_000))
def test_all_series_share_one_budget(widths, budget):
    history = History(max_bytes=budget)
    names = [Signal(f"gradient/part{i}", ("parameter",), "norm") for i in range(len(widths))]
    cells = [Cells.along("parameter", range(w)) for w in widths]
    for step in range(300):
        for signal, c in zip(names, cells):
            history.add(step, Reading(signal, c, np.full(len(c), step, np.float32), np.ones(len(c), bool)))
        assert history.nbytes <= budget
    for signal in names:
        series = history[signal.name]
        assert series.steps[0] == 0
        assert series.steps[-1] == 299
        assert (series.values == series.steps[:, None]).all()


def test_each_series_keeps_four_samples_however_large_they_are():
    history = History(max_bytes=1)
    cells = Cells.along("parameter", range(1000))
    signal = Signal("gradient/parameter_norm", ("parameter",), "norm")
    for step in range(50):
        history.add(step, Reading(signal, cells, np.zeros(1000, np.float32), np.ones(1000, bool)))
        assert history.nbytes <= 6 * (16 + 5 * 1000)
    assert len(history["gradient/parameter_norm"]) >= 4
    assert history["gradient/parameter_norm"].steps[[0, -1]].tolist() == [0, 49]


def test_chunks_give_what_single_samples_give():
    single, chunked = History(max_samples=64), History(max_samples=64)
    cells = Cells.along("parameter", "ab")
    signal = Signal("gradient/parameter_norm", ("parameter",), "norm")
    steps = np.arange(60)
    values = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    seen = values > -1
    for step, v, s in zip(steps, values, seen):
        single.add(int(step), Reading(signal, cells, v, s))
    chunked.extend(signal, steps[:37], cells, values[:37], seen[:37])
    chunked.extend(signal, steps[37:], cells, values[37:], seen[37:])
    a, b = single[signal.name], chunked[signal.name]
    assert (a.steps == b.steps).all()
    assert (a.values == b.values).all()
    assert (a.seen == b.seen).all()


def test_bounds_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"max_samples >= 4.*got 3"):
        History(max_samples=3)
