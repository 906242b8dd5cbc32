"""A few tags stand for every frame, and none of them hides a spike, a NaN or an absence."""

from __future__ import annotations

import math

import numpy as np

from traindiag.panels.aggregates import FAST_EVERY, MAX_TAGS, Aggregates
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal

HEADS = Cells(("layer", "head"), (("a", 0), ("a", 1), ("b", 0), ("b", 1)))


def reading(name, values, cells, seen=None):
    values = np.array(values, np.float32)
    return Reading(BY_NAME[name], cells, values, np.ones(len(values), bool) if seen is None else np.array(seen))


def frame(step, lane, *readings, rates=None):
    return Frame(step, lane, {r.signal.name: r for r in readings}, RunInfo(), learning_rates=rates or {})


def fast(step, norm, optimizers=("adam",)):
    return frame(step, "fast", reading("gradient/norm", norm, Cells.along("optimizer", optimizers)))


def test_a_slow_frame_becomes_its_worst_cell_and_where_useful_its_median():
    points = Aggregates().update(
        frame(
            0,
            "slow",
            reading("attention/max_logit", [1, 9, 3, 100], HEADS, [True, True, True, False]),
            reading("attention/entropy", [2, 1, 3, 4], HEADS),
            reading("attention/query_norm", [2, 1, 3, 4], HEADS),
            reading("activation/max", [5, 7], Cells.along("layer", ("a", "b"))),
            reading("activation/rms", [2, 1], Cells.along("layer", ("a", "b"))),
            rates={"adam": 0.5},
        )
    )
    assert points == {
        "diag_attention/max_logit": 9,
        "diag_attention/max_logit_median": 3,
        "diag_attention/entropy_min": 1,
        "diag_attention/entropy_median": 2.5,
        "diag_attention/query_norm_max": 4,
        "diag_activation/max": 7,
        "diag_activation/rms_max": 2,
        "diag_optimizer/learning_rate": 0.5,
    }


def test_a_nan_shows_and_an_absence_does_not():
    aggregates = Aggregates()
    nan = aggregates.update(frame(0, "slow", reading("attention/max_logit", [1, math.nan, 3, 4], HEADS)))
    assert math.isnan(nan["diag_attention/max_logit"])
    assert (
        aggregates.update(frame(10, "slow", reading("attention/max_logit", [math.nan] * 4, HEADS, [False] * 4))) == {}
    )


def test_a_spike_between_two_samples_is_not_lost():
    for slow_first in (True, False):
        aggregates, points = Aggregates(), {}
        for step in range(21):
            lanes = [frame(step, "slow")] if step % 10 == 0 else []
            lanes.insert(len(lanes) * slow_first, fast(step, [50.0 if step == 14 else 1.0 + step / 100]))
            for f in lanes:
                if got := aggregates.update(f):
                    points.setdefault(step, {}).update(got)
        assert list(points) == [0, 10, 20]
        norm = np.float32(1.2)
        assert points[20] == {"diag_gradient/norm": norm, "diag_gradient/norm_max": 50.0}
        assert points[10]["diag_gradient/norm_max"] == np.float32(1.1)


def test_a_nan_stays_the_worst_until_it_is_shown():
    aggregates = Aggregates()
    for step, value in enumerate([1.0, 2.0, math.nan, 3.0]):
        aggregates.update(fast(step, [value]))
    step, points = aggregates.flush()
    assert step == 3
    assert points["diag_gradient/norm"] == 3
    assert math.isnan(points["diag_gradient/norm_max"])
    assert aggregates.flush()[1] == {}


def test_without_slow_samples_the_fast_lane_sets_its_own_pace():
    aggregates = Aggregates()
    shown = [step for step in range(120) if aggregates.update(fast(step, [1.0]))]
    assert shown == [0, FAST_EVERY, 2 * FAST_EVERY]


def test_optimizers_are_never_joined():
    points = Aggregates().update(fast(0, [1.0, 2.0], ("actor", "critic")))
    assert points == {
        "diag_gradient/norm/actor": 1,
        "diag_gradient/norm/critic": 2,
        "diag_gradient/norm_max/actor": 1,
        "diag_gradient/norm_max/critic": 2,
    }


def test_their_own_numbers_and_details_stay_in_the_log():
    parameters = Cells(("optimizer", "parameter"), (("adam", "w"), ("adam", "b")))
    logged = Reading.scalar(Signal("logged/val_loss", (), "logged"), 1.0)
    assert Aggregates().update(frame(0, "slow", logged, reading("gradient/parameter_norm", [1, 2], parameters))) == {}


def test_tags_are_bounded():
    aggregates = Aggregates()
    many = [Reading.scalar(Signal(f"reward/part{i}", (), "reward"), i) for i in range(100)]
    first = aggregates.update(frame(0, "slow", *many))
    assert len(first) == MAX_TAGS
    assert aggregates.update(frame(10, "slow", *many)).keys() == first.keys()
