"""Growth and falls over many steps, against the statistics module."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from tests.rules.frames import X, active_at, feed, frame, reading
from tests.rules.series import judge, noise
from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.rules.rule import Verdict
from traindiag.rules.trend import Trend


def growth(per_1000: float, steps: int = 1200, every: int = 10, sigma: float = 0.1) -> list[float]:
    drawn = np.random.default_rng(0).normal(0, sigma, steps)
    return [per_1000 ** (t / 1000) * math.exp(drawn[t]) for t in range(0, steps, every)]


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_as_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    series = [3 ** (t / 1000) * math.exp(rng.standard_t(3) * 0.05) for t in range(700)]
    rule = Trend("user/x", growth_per_1000=1.5, window=320)  # intervals of 5 steps
    seen = rng.random(700) < 0.5
    for step, value in enumerate(series):
        rule.update(frame(step, reading([value], seen=[bool(seen[step])])))
        if step // 5 > 100 and rule._intervals[step // 5 % 64] == step // 5:  # its first sample has been judged
            break
    last = step // 5
    means = {}
    for k in range(last - 63, last + 1):
        if logs := [math.log(series[t]) for t in range(5 * k, min(5 * k + 5, step + 1)) if seen[t]]:
            means[k] = statistics.fmean(logs)
    kept = sorted(means)
    pairs = zip(kept, kept[len(kept) // 2 :])
    slope = statistics.median((means[b] - means[a]) / (5 * (b - a) / 1000) for a, b in pairs)
    assert rule._table["side"][0] == 1
    assert rule._table["slope"][0] == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("every", [1, 10])
def test_growth_is_told_with_its_factor_and_over_when_it_ends(every: int) -> None:
    series = growth(3.0, every=every)
    said = feed(Trend("user/x", growth_per_1000=2.0), series + [series[-1]] * len(series), every=every)
    last = said[len(series) - 1]
    assert last is not None
    assert 2.6 < float(last.evidence.split("grows ")[1].split()[0]) < 3.4
    at = active_at(said)
    assert at == list(range(at[0], at[-1] + 1))
    assert at[0] * every <= 500
    assert 1200 < at[-1] * every < 2200
    ended = said[at[-1] + 1]
    assert ended is not None
    assert not ended.active
    assert not any(said[at[-1] + 2 :])


def test_growth_below_the_factor_and_falls_are_not_told() -> None:
    assert not any(feed(Trend("user/x", growth_per_1000=2.0), growth(1.6), every=10))
    falling = growth(0.3)
    assert not any(feed(Trend("user/x", growth_per_1000=2.0), falling, every=10))
    for direction in ("down", "both"):
        said = feed(Trend("user/x", growth_per_1000=2.0, direction=direction), falling, every=10)  # type: ignore[arg-type]
        assert active_at(said)
        assert "falls 3." in (said[-1] or Verdict("", "", "", 0)).evidence


def test_the_limit_lets_go_at_half_of_its_logarithm() -> None:
    def series(then: float) -> list[float]:
        return [3 ** (min(t, 1000) / 1000) * then ** (max(t - 1000, 0) / 1000) for t in range(0, 2500, 10)]

    held = feed(Trend("user/x", growth_per_1000=2.0), series(1.6), every=10)  # log 1.6 > half of log 2
    assert active_at(held)[-1] == 249
    left = feed(Trend("user/x", growth_per_1000=2.0), series(1.3), every=10)
    assert active_at(left)[-1] < 200


def test_growth_from_nothing_is_none() -> None:
    tiny = [1e-9 * v for v in growth(10.0)]
    assert active_at(feed(Trend("user/x", growth_per_1000=2.0), tiny, every=10))
    assert not any(feed(Trend("user/x", growth_per_1000=2.0, above=1e-3), tiny, every=10))
    falling = growth(0.1)
    down = feed(Trend("user/x", growth_per_1000=2.0, direction="down", above=0.9), falling, every=10)
    assert active_at(down)  # it falls from there


def test_spikes_do_not_turn_the_slope() -> None:
    flat = np.exp(np.random.default_rng(1).normal(0, 0.05, 200))
    for at in (150, 170, 171, 195, 199):
        flat[at] = 1e6
    assert not any(feed(Trend("user/x", growth_per_1000=1.2), flat.tolist(), every=10))
    rising = np.array(growth(3.0))
    rising[::17] = 1e-6
    assert active_at(feed(Trend("user/x", growth_per_1000=2.0), rising.tolist(), every=10))[-1] == 119


def test_bad_values_and_unseen_cells_change_nothing() -> None:
    clean = feed(Trend("user/x", growth_per_1000=2.0), growth(3.0), every=10)
    rule, said = Trend("user/x", growth_per_1000=2.0), []
    for i, value in enumerate(growth(3.0)):
        said += list(rule.update(frame(10 * i, reading([value])))) or [None]  # type: ignore[list-item]
        for bad in (math.nan, math.inf, 0.0, -1.0):
            assert not any(v.value == bad for v in rule.update(frame(10 * i, reading([bad]))))
            assert not rule.update(frame(10 * i, reading([value * 9], seen=[False])))
    assert said == clean


def test_the_window_scales_with_the_run_within_bounds() -> None:
    def steps_looked_at(run: RunInfo) -> int:
        rule, evidence = Trend("user/x", growth_per_1000=2.0), ""
        for step in range(0, 4000, 5):
            for verdict in rule.update(frame(step, reading([10 ** (step / 1000)]), run=run)):
                evidence = verdict.evidence
        return int(evidence.split("last ")[1].split()[0])

    lengths = {None: 1000, 100: 250, 3000: 600, 10**6: 2000}
    for length, expected in lengths.items():
        assert 0.7 * expected <= steps_looked_at(RunInfo(length=length)) <= expected


def test_the_steepest_cell_is_told_and_cells_may_join() -> None:
    rule, said = Trend("user/x", growth_per_1000=2.0), []
    for i in range(110):
        names = "ab" if i < 30 else "cab"
        rates = {"a": 4.0, "b": 1.0, "c": 9.0}
        values = [rates[n] ** (i / 100) for n in names]
        said += list(rule.update(frame(10 * i, reading(values, X, Cells.along("place", names)))))
    assert [str(v.cell) for v in said][:1] == ["a"]
    assert (str(said[-1].cell), said[-1].others) == ("c", 1)


def test_most_growth_is_told_before_it_has_doubled_twice() -> None:
    grown = noise("AR(0.9)", 2000, 100, seed=5, sigma=0.1) * 4.0 ** (np.arange(2000) / 1000)[:, None]
    first = judge(Trend("user/p", growth_per_1000=2.0), grown).first
    assert (first >= 0).all()
    assert first.max() <= 1000


def test_during_warm_up_nothing_is_learned_and_a_jump_of_the_rate_begins_anew() -> None:
    warm = RunInfo(warmup=500)
    rule = Trend("user/x", growth_per_1000=2.0)
    told = [i for i, v in enumerate(growth(3.0)) if rule.update(frame(10 * i, reading([v]), run=warm))]
    assert told[0] * 10 >= 500 + 16 * 15
    rule = Trend("user/x", growth_per_1000=2.0)
    for i, value in enumerate(growth(3.0)):
        rate = 1.0 if i < 100 else 0.5
        verdicts = rule.update(frame(10 * i, reading([value]), learning_rates={"adam": rate}))
        assert (rule._table["counts"] > 0).sum() <= max(i, 0) + 1
        if i == 100:
            assert [v.active for v in verdicts] == [False]
            assert (rule._table["counts"] > 0).sum() == 1


def test_steps_that_were_taken_back_never_happened() -> None:
    def flat(step: int) -> float:
        return math.exp(0.05 * math.sin(step))

    rule = Trend("user/x", growth_per_1000=2.0)
    for step in range(0, 600, 5):
        rule.update(frame(step, reading([flat(step)])))
    for step in range(600, 1400, 5):
        rule.update(frame(step, reading([flat(step) * 20 ** ((step - 600) / 800)])))
    assert rule._table["side"][0] == 1
    for step in range(600, 1600, 5):
        verdicts = rule.update(frame(step, reading([flat(step)]), segment=1))
        assert [v.active for v in verdicts] == [False] * (step == 600)
    straight = Trend("user/x", growth_per_1000=2.0)
    for step in range(0, 1600, 5):
        straight.update(frame(step, reading([flat(step)])))
    np.testing.assert_allclose(rule._table["sums"], straight._table["sums"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"growth_per_1000": 1.0}, "growth_per_1000 must be a finite float32 above 1, got 1.0"),
        ({"growth_per_1000": 2.0, "direction": "sideways"}, "direction must be one of up, down, both"),
        ({"growth_per_1000": 2.0, "window": 10}, "window must be an integer of at least 64"),
        ({"growth_per_1000": 2.0, "min_samples": 65}, "min_samples must be at most 64"),
        ({"growth_per_1000": 2.0, "above": 0.0}, "above must be a finite float32 above 0"),
    ],
)
def test_wrong_arguments_raise(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trend("user/x", **given)  # type: ignore[arg-type]
