"""Levels that are left for good, against the test written out for one cell."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest

from tests.rules.frames import active_at, feed, frame, reading
from tests.rules.series import POSITIVE, judge, noise
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal
from traindiag.rules.rule import Direction
from traindiag.rules.shift import Shift


def plain(series: list[float], n: int, delta: float = 0.75, limit: float = 15.0) -> list[int]:
    """The rule upwards on one cell, as a sentence in plain Python; no value may be bad."""

    def clipped(value: float, most: float) -> float:
        return max(-most, min(most, value))

    def spread(values: list[float]) -> float:
        return 1.4826 * statistics.median(abs(v) for v in values)

    found: list[int] = []
    past: list[float] = []
    total = level = carried = deviation = before = 0.0
    for i, value in enumerate(series):
        if len(past) < n:
            past.append(value)
            if len(past) == n:
                level, total = statistics.median(past), 0.0
                away = [p - level for p in past]
                near = [clipped(a, 3 * spread(away)) for a in away]
                r = sum(a * b for a, b in pairwise(near)) / sum(a * a for a in near)
                carried = max(0.0, min(0.95, (r * n + 1) / (n - 4)))
                rest = [b - carried * a for a, b in pairwise(away)]
                middle = statistics.median(rest)
                deviation = max(spread([r - middle for r in rest]), 0.01 * abs(level))
                before = clipped(away[-1] / deviation, 100)
            continue
        now = clipped((value - level) / deviation, 100)
        total, before = max(0.0, total + clipped(now - carried * before, 5) - delta), now
        if total > limit:
            found.append(i)
            past = []
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_same_as_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=600)
    if seed % 2:
        for t in range(1, 600):
            drawn[t] += 0.6 * drawn[t - 1]
    series = (10 + drawn + np.repeat([0, 5, 12, 25, 50, 80], 100)).astype(np.float32).astype(float).tolist()
    assert len(plain(series, 40)) >= 2
    assert active_at(feed(Shift("user/x", min_samples=40), series)) == plain(series, 40)


def test_a_shift_is_told_once_and_its_level_becomes_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    series = [*rng.normal(5, 1, 100), *rng.normal(15, 1, 500), *rng.normal(30, 1, 100)]
    said = feed(Shift("user/x"), series)
    assert active_at(said) == [103, 603]
    assert [i for i, v in enumerate(said) if v is not None and not v.active] == [104, 604]
    assert said[103] is not None and said[603] is not None
    assert said[103].limit == pytest.approx(5, abs=0.5)
    assert said[603].limit == pytest.approx(15, abs=0.5)
    assert "above its level" in said[103].evidence and "for 4 values" in said[103].evidence


@pytest.mark.parametrize(
    ("direction", "up", "down"), [("up", True, False), ("down", False, True), ("both", True, True)]
)
def test_directions(direction: Direction, up: bool, down: bool) -> None:
    flat = np.exp(np.random.default_rng(0).normal(0, 0.2, 100)).tolist()
    for factor, expected in ((10.0, up), (0.1, down)):
        said = feed(Shift("user/x", direction=direction), flat + [factor * v for v in flat])
        assert bool(active_at(said)) == expected


def test_one_value_is_no_shift() -> None:
    calm = np.random.default_rng(0).normal(5, 1, 400)
    calm[[80, 150, 151, 300]] = 1e30
    assert not any(feed(Shift("user/x", direction="both"), calm.tolist()))


@pytest.mark.parametrize("signal", [POSITIVE, Signal("user/p", (), "a number")])
def test_a_collapse_to_zero_is_told_within_four_values(signal: Signal) -> None:
    flat = np.exp(np.random.default_rng(0).normal(3, 0.1, 100)).tolist()
    said = feed(Shift("user/p", direction="down"), [*flat, *[0.0] * 20], signal)
    assert active_at(said) == [103]
    assert said[103] is not None
    assert said[103].value == 0.0


def test_zeros_are_never_the_level() -> None:
    rule = Shift("user/p", direction="both")
    assert not any(feed(rule, [0.0] * 100, POSITIVE))
    assert rule._table["count"].tolist() == [0]


def test_a_flat_history_then_a_jump() -> None:
    for level in (0.0, 1.0, -3.0):
        said = feed(Shift("user/x", direction="both"), [level] * 200 + [level + 1.0] * 30)
        assert active_at(said) == [203]
    assert not any(feed(Shift("user/x", direction="both"), [1.0] * 200 + [1.005] * 200))  # below 1 % of the level


def test_bad_values_are_neither_learned_nor_judged() -> None:
    rng = np.random.default_rng(1)
    series = [*rng.normal(5, 1, 80), *rng.normal(12, 1, 20)]
    clean = [v for v in feed(Shift("user/x"), series) if v is not None]
    rule, dirty = Shift("user/x"), []
    for i, value in enumerate(series):
        dirty += rule.update(frame(i, reading([value])))
        for bad in (math.nan, math.inf, -math.inf):
            assert not rule.update(frame(i, reading([bad])))
        assert not rule.update(frame(i, reading([1e9], seen=[False])))
    assert dirty[0] == clean[0]
    collapse = feed(Shift("user/x", direction="both"), [*series[:80], *[math.nan] * 100])
    assert not any(collapse)  # NonFinite's business


def test_most_shifts_are_told_within_ten_values() -> None:
    shifted = noise("independent", 300, 200, seed=2)
    shifted[200:] *= math.exp(3 * 0.35)
    first = judge(Shift("user/p"), shifted).first
    assert np.mean((first >= 200) & (first <= 210)) >= 0.9
    correlated = noise("AR(0.9)", 400, 200, seed=2)
    correlated[200:] *= math.exp(10 * 0.35)
    first = judge(Shift("user/p"), correlated).first
    assert np.mean((first >= 200) & (first <= 250)) >= 0.9


def test_the_baseline_begins_after_warm_up_and_anew_where_the_rate_jumps() -> None:
    rng = np.random.default_rng(0)
    warm, typical = rng.normal(1, 0.1, 100).tolist(), rng.normal(5, 0.1, 300).tolist()
    assert active_at(feed(Shift("user/x"), warm + typical))
    assert not any(feed(Shift("user/x"), warm + typical, run=RunInfo(warmup=100)))
    rule = Shift("user/x")
    for i in range(120):
        rule.update(frame(i, reading([warm[0]]), run=RunInfo(warmup=100)))
    assert rule._table["count"].tolist() == [20]
    for rate, expected in ((1.0, True), (0.5, False)):
        rule = Shift("user/x")
        said = [
            rule.update(frame(i, reading([v]), learning_rates={"adam": 1.0 if i < 100 else rate}))
            for i, v in enumerate(warm + typical)
        ]
        assert any(said) == expected


def test_steps_that_were_taken_back_never_happened() -> None:
    rng = np.random.default_rng(0)
    calm = rng.normal(5, 1, 400).tolist()
    rule = Shift("user/x")
    for i in range(30):
        rule.update(frame(i, reading([calm[i]])))
    for i in range(30, 50):
        rule.update(frame(i, reading([1e6])))  # of these the baseline is learned ...
    for i in range(30, 400):
        assert not rule.update(frame(i, reading([calm[i]]), segment=1))  # ... and now it is not
    straight = Shift("user/x")
    for i in range(400):
        straight.update(frame(i, reading([calm[i]])))
    assert repr(rule._table.state_dict()) == repr(straight._table.state_dict())
    for i in range(380, 385):
        rule.update(frame(i, reading([calm[i] + 3]), segment=2))  # what had added up is forgotten too
    assert rule._table["up"][0] > 0
    rule.update(frame(380, reading([calm[380]]), segment=3))
    assert rule._table["up_for"][0] <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"direction": "left"}, "direction must be one of up, down, both, got 'left'"),
        ({"delta": 0.0}, "delta must be a finite float32 above 0, got 0.0"),
        ({"delta": 5.0}, "delta must lie below the largest score of a value, 5, got 5.0"),
        ({"limit": 4.0}, "limit must be a finite float32 above 5, got 4.0"),
        ({"min_samples": 8}, "min_samples must be an integer of at least 16, got 8"),
        ({"severity": "bad"}, "severity must be one of"),
    ],
)
def test_wrong_arguments_raise(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shift("user/x", **given)  # type: ignore[arg-type]
