"""Jumps of a positive signal, against the statistics module."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest

from tests.rules.frames import active_at, feed, frame, reading
from traindiag.record.run_info import RunInfo
from traindiag.rules.spike import Spike

BLOOM = [0.242, 0.947, 2.39, 15.9, 145.0, 960.0]
"""Gradient norm of BLOOM-176B at steps 31214 to 31219; the loss spiked at 31219."""


def plain(series: list[float], factor: float = 4.0, z: float = 4.0, window: int = 100) -> list[int]:
    """The rule on one cell, written as a sentence."""
    found = []
    for i, value in enumerate(series):
        past = [math.log(v) for v in series[max(0, i - window) : i]]
        if len(past) < 4:
            continue
        above = math.log(value) - statistics.median(past[-8:])
        spread = statistics.median(abs(b - a) for a, b in pairwise(past)) / 0.6744897501960817 / math.sqrt(2)
        if above >= math.log(factor) and (len(past) < 16 or above >= z * spread):
            found.append(i)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = np.exp(rng.standard_t(2, 300) * 0.5).astype(np.float32).astype(float).tolist()
    assert plain(series)
    assert active_at(feed(Spike("user/x"), series)) == plain(series)


@pytest.mark.parametrize("at", [4, 5, 7, 12, 20, 60, 150, 399])
def test_a_tenfold_jump_is_told_at_its_step(at: int) -> None:
    rng = np.random.default_rng(at)
    missed = 0
    for _ in range(40):
        norm = (1 + 9 * np.exp(-np.arange(400) / 30)) * np.exp(rng.normal(0, 0.15, 400))
        norm[at] = 10 * (1 + 9 * math.exp(-at / 30))
        missed += at not in active_at(feed(Spike("gradient/norm"), norm[: at + 1], "gradient/norm"))
    assert missed == 0


def test_healthy_noise_is_nearly_silent() -> None:
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(20):  # 20 young runs whose gradient norm falls, 20,000 steps in all
        norm = (1 + 9 * np.exp(-np.arange(1000) / 100)) * np.exp(rng.normal(0, 0.35, 1000))
        told += len(active_at(feed(Spike("gradient/norm"), norm, "gradient/norm")))
    assert told <= 3


def test_bloom_is_told_steps_before_its_loss_spike() -> None:
    healthy = np.exp(np.random.default_rng(0).normal(math.log(0.24), 0.1, 200)).tolist()
    said = feed(Spike("gradient/norm"), healthy + BLOOM, "gradient/norm")
    assert {202, 203, 204, 205} <= set(active_at(said))  # from 31216 on, three steps before


def test_a_level_that_stays_becomes_the_baseline() -> None:
    said = active_at(feed(Spike("user/x"), [1.0] * 60 + [10.0] * 200))
    assert said == [60, 61, 62, 63]  # until half of the last eight are of the new level


def test_in_a_noisy_series_the_factor_is_not_enough() -> None:
    noisy = np.exp(np.random.default_rng(3).normal(0, 1.0, 100)).tolist()
    assert active_at(feed(Spike("user/x", z=1e-9), [*noisy, 6.0]))[-1:] == [100]
    assert 100 not in active_at(feed(Spike("user/x"), [*noisy, 6.0]))


def test_bad_values_never_enter_the_window() -> None:
    series = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95]
    for bad in (math.nan, math.inf, 0.0, -3.0):
        assert active_at(feed(Spike("user/x"), [*series, bad, bad, bad, 1.0, 20.0])) == [10]


def test_it_ends_once() -> None:
    said = feed(Spike("user/x"), [1.0] * 5 + [50.0, 1.0, 1.0])
    assert [None if v is None else v.active for v in said[5:]] == [True, False, None]


def test_the_applied_norm_is_judged_only_where_there_is_no_other() -> None:
    def rule() -> Spike:
        return Spike("gradient/norm", otherwise="gradient/norm_applied")

    steady, jump = [1.0] * 10, [30.0]
    assert active_at(feed(rule(), steady + jump, "gradient/norm_applied")) == [10]
    both = rule()
    for i in range(10):
        both.update(frame(i, reading([5.0], "gradient/norm"), reading([1.0], "gradient/norm_applied")))
    assert not both.update(frame(10, reading([30.0], "gradient/norm_applied")))
    (verdict,) = both.update(frame(11, reading([30.0], "gradient/norm")))
    assert verdict.evidence == "gradient/norm is 30, 6 times the median 5 of the last 8 values"


def test_the_largest_jump_of_all_cells_is_told() -> None:
    rule = Spike("user/x")
    for i in range(6):
        rule.update(frame(i, reading([1.0, 10.0, 1.0])))
    (verdict,) = rule.update(frame(6, reading([9.0, 50.0, 1.0])))
    assert (str(verdict.cell), verdict.others, verdict.value) == ("place0", 1, 9.0)


def test_falls_are_told_where_they_matter() -> None:
    series = [*np.exp(np.random.default_rng(0).normal(0, 0.1, 60)).tolist(), 0.1, 1.0, 10.0, 1.0]
    assert active_at(feed(Spike("user/x"), series)) == [62]
    assert active_at(feed(Spike("user/x", direction="down"), series)) == [60]
    said = feed(Spike("user/x", direction="both"), series)
    assert active_at(said) == [60, 62]
    assert said[60] is not None
    assert said[60].evidence.startswith("user/x is 0.1, down from the median ")
    assert said[60].limit == pytest.approx(1 / 4, rel=0.1)


def test_a_collapse_to_zero_is_told_for_as_long_as_it_stays_and_is_never_the_baseline() -> None:
    series = [1.0] * 20 + [0.0] * 200 + [1.0] * 5
    for direction in ("down", "both"):
        said = feed(Spike("user/x", direction=direction), series)  # type: ignore[arg-type]
        assert active_at(said) == list(range(20, 220))
        assert said[100] is not None
        assert said[100].evidence == "user/x is 0, down from the median 1 of the last 8 values"
    assert not any(feed(Spike("user/x"), series))
    assert not any(feed(Spike("user/x", direction="both"), [1.0] * 20 + [math.nan] * 200))  # NonFinite's business


def test_a_spike_is_no_measure_for_itself_or_the_next() -> None:
    rng = np.random.default_rng(0)
    for size in (5.0, 1e3, 1e30):
        series = np.exp(rng.normal(0, 0.1, 300))
        series[[100, 104, 200]] *= size
        assert active_at(feed(Spike("user/x"), series.tolist())) == [100, 104, 200]
    assert active_at(feed(Spike("user/x"), [1.0] * 100 + [4.1])) == [100]  # out of a flat history too


def test_values_of_warm_up_leave_when_there_are_enough_later_ones() -> None:
    rng = np.random.default_rng(0)
    wild = np.exp(rng.normal(0, 1.0, 60))
    wild[50] = 300.0
    calm = np.exp(rng.normal(0, 0.05, 30))
    calm[[10, 28]] = 6.0
    series = [*wild, *calm]
    assert 50 in active_at(feed(Spike("user/x"), series, run=RunInfo(warmup=60)))  # warm-up is judged by itself
    assert active_at(feed(Spike("user/x"), series))[-1] < 60  # 6 is nothing to the wild beginning ...
    assert active_at(feed(Spike("user/x"), series, run=RunInfo(warmup=60)))[-1] == 88  # ... and something after it


def test_a_job_that_is_resumed_after_warm_up_still_lets_go_of_it() -> None:
    rule, run = Spike("user/x"), RunInfo(warmup=60)
    for i in range(90):
        if i == 65:
            state, rule = rule.state_dict(), Spike("user/x")
            rule.load_state_dict(state)
        rule.update(frame(i, reading([1.0]), run=run))
    assert rule._table["count"].tolist() == [30]


def test_a_jump_of_the_learning_rate_is_no_spike() -> None:
    def told(rates: list[float]) -> list[int]:
        rule, series = Spike("user/x"), [1.0] * 30 + [10.0] * 10 + [100.0]
        said = [
            rule.update(frame(i, reading([v]), learning_rates={"adam": rates[i >= 30]})) for i, v in enumerate(series)
        ]
        return [i for i, verdicts in enumerate(said) if verdicts and verdicts[0].active]

    assert told([1.0, 1.0]) == [30, 31, 32, 33, 40]
    assert told([1.0, 2.0]) == [40]
    assert told([1.0, 1.4]) == [30, 31, 32, 33, 40]


def test_values_that_were_taken_back_never_happened() -> None:
    rng = np.random.default_rng(0)
    calm = np.exp(rng.normal(0, 0.1, 80))
    straight, back = Spike("user/x"), Spike("user/x")
    for i in range(60):
        straight.update(frame(i, reading([calm[i]])))
    for i in range(40):
        back.update(frame(i, reading([calm[i]])))
    for i in range(40, 70):
        back.update(frame(i, reading([1000.0])))
    for i in range(40, 60):
        assert not [v for v in back.update(frame(i, reading([calm[i]]), segment=1)) if v.active]
    assert repr(back._table.last(60)) == repr(straight._table.last(60))
    (verdict,) = back.update(frame(60, reading([6.0]), segment=2))  # a plain resume changes nothing
    assert verdict.active


def test_wrong_direction_raises() -> None:
    with pytest.raises(ValueError, match="direction must be one of up, down, both, got 'sideways'"):
        Spike("user/x", direction="sideways")  # type: ignore[arg-type]


def test_a_norm_that_goes_on_climbing_is_a_warning() -> None:
    """The gradient norm of BLOOM-176B before its first loss spike, after a calm past."""
    past = [0.24 + 0.02 * (i % 3) for i in range(60)]
    said = feed(Spike("user/x", rising=3), [*past, 0.95, 2.4, 16.0, 145.0, 960.0])
    told = [(i - 60, v.severity) for i, v in enumerate(said) if v is not None and v.active]
    assert told[-3:] == [(2, "warning" if told[0][0] == 0 else "info"), (3, "warning"), (4, "warning")]
    assert said[-1] is not None and "has climbed for" in said[-1].evidence


def test_one_that_jumps_and_stays_is_none() -> None:
    said = feed(Spike("user/x", rising=3), [1.0, 1.1, 0.9] * 20 + [100.0, 110.0, 95.0, 105.0, 100.0])
    assert {v.severity for v in said if v is not None} == {"info"}


def test_climbing_begins_anew_after_a_calm_value() -> None:
    said = feed(Spike("user/x", rising=3), [1.0, 1.1, 0.9] * 20 + [10.0, 20.0, 1.0, 10.0, 20.0, 1.0])
    assert {v.severity for v in said if v is not None} == {"info"}
