"""When a growing signal crosses, against closed forms and polyfit."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from tests.rules.frames import X, active_at, feed, frame, reading
from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.rules.forecast import Forecast
from traindiag.rules.line_fit import fit_lines
from traindiag.rules.rule import Verdict

# Largest logit range of one head of a small GPT, every 10th step: learning rate 0.1 (fails), 0.03 (healthy).
FAILING = [1.43, 38.7, 199, 346, 664, 890, 1300, 1350, 1350]
HEALTHY = [1.65, 1.04, 29.2, 79.5, 108, 97.7, 88.2, 83.4, 75.2, 60.5, 39.7, 43.1, 69]


def test_exponential_growth_crosses_where_arithmetic_says() -> None:
    late = 500  # growth that begins late: over the window both axes are straight
    series = [2.0 * math.exp(0.01 * 10 * i) for i in range(30)]
    rule, last = Forecast("user/x", limit=1000.0), None
    for i, value in enumerate(series):
        (last,) = rule.update(frame(late + 10 * i, reading([value]))) or (None,)
    assert last is not None
    assert last.steps_to_limit is not None
    low, mid, high = last.steps_to_limit
    assert mid == pytest.approx(math.log(1000.0 / series[-1]) / 0.01, rel=1e-3)
    assert low <= mid <= high
    assert f"in about {round(mid)} steps" in last.evidence


def test_power_law_growth_crosses_where_arithmetic_says() -> None:
    said = feed(Forecast("user/x", limit=1000.0), [0.05 * (t + 1) ** 2 for t in range(0, 101, 10)], every=10)
    last = said[-1]
    assert last is not None
    assert last.steps_to_limit is not None
    assert last.steps_to_limit[1] == pytest.approx(math.sqrt(1000 / 0.05) - 101, rel=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, held, told = np.random.default_rng(0), 0, 0
    steps = np.arange(1000, 1500, 10)
    truth = 1490 + math.log(1000 / math.exp(0.008 * 490)) / 0.008
    for _ in range(100):
        rule, last = Forecast("user/x", limit=1000.0), None
        for step, noise in zip(steps, rng.normal(0, 0.2, steps.size)):
            verdicts = rule.update(frame(int(step), reading([math.exp(0.008 * (step - 1000) + noise)])))
            last = verdicts[0] if verdicts and verdicts[0].active else None
        if last is not None and last.steps_to_limit is not None:
            told += 1
            held += last.steps_to_limit[0] <= truth - 1490 <= last.steps_to_limit[2]
    assert told > 80
    # 80 % is of one line; the range also spans the other one, so it may hold more often, never much less.
    assert held / told >= 0.75


def test_a_failing_run_is_told_before_its_limit_and_a_healthy_one_never() -> None:
    said = active_at(feed(Forecast("user/x", limit=1e3), FAILING, every=10))
    assert said
    assert said[0] == 5  # the limit is passed at the next sample
    for limit in (1e3, 1e4):
        assert not active_at(feed(Forecast("user/x", limit=limit), HEALTHY, every=10))


@pytest.mark.parametrize(
    "series",
    [
        pytest.param([400 * (1 - math.exp(-t / 150)) + 1 for t in range(0, 1500, 10)], id="bends below the limit"),
        pytest.param([900.0] * 60, id="flat"),
        pytest.param([900 * math.exp(-t / 300) for t in range(0, 600, 10)], id="falls"),
        pytest.param([1.0 * math.exp(t * 1e-3) for t in range(0, 1000, 10)], id="crosses beyond the horizon"),
        pytest.param([-5.0, 0.0, -1.0, math.nan, math.inf] * 10, id="has no logarithm"),
    ],
)
def test_silent(series: list[float]) -> None:
    assert not active_at(feed(Forecast("user/x", limit=1000.0), series, every=10))


def test_silent_where_no_line_fits() -> None:
    rng, fits = np.random.default_rng(0), []
    for _ in range(30):
        noisy = [2 * 1.1**i * math.exp(rng.normal(0, 0.4)) for i in range(60)]
        for verdict in feed(Forecast("user/x", limit=1e3, persistence=1), noisy, every=10):
            told = re.search(r"R2 ([0-9.]+)", verdict.evidence if verdict else "")
            fits += [float(told[1])] if told else []
    assert len(fits) > 20
    assert min(fits) >= 0.8


def test_it_needs_consecutive_samples() -> None:
    series = [2.0 * 1.2**i for i in range(35)]
    first = active_at(feed(Forecast("user/x", limit=1e3, persistence=1), series, every=10))[0]
    assert active_at(feed(Forecast("user/x", limit=1e3, persistence=3), series, every=10))[:1] == [first + 2]


def test_the_horizon_ends_with_the_run_and_says_so_when_that_is_unknown() -> None:
    series = [2.0 * 1.1**i for i in range(60)]
    unknown = [v for v in feed(Forecast("user/x", limit=1e3), series, every=10) if v is not None]
    assert "length is unknown, so it looks ahead by the steps run so far" in unknown[0].evidence
    known = feed(Forecast("user/x", limit=1e3), series, every=10, run=RunInfo(length=100_000))
    assert active_at(known)
    assert all("unknown" not in v.evidence for v in known if v is not None)
    assert not active_at(feed(Forecast("user/x", limit=1e3), series[:50], every=10, run=RunInfo(length=500)))
    assert active_at(feed(Forecast("user/x", limit=1e3, horizon=400), series[:50], every=10, run=RunInfo(length=500)))


def test_bad_values_do_not_move_the_line() -> None:
    clean = feed(Forecast("user/x", limit=1e3), [2.0 * 1.2**i for i in range(30)], every=10)
    dirty: list[float] = [2.0 * 1.2**i for i in range(30)]
    rule = Forecast("user/x", limit=1e3)
    said: list[Verdict] = []
    for i, value in enumerate(dirty):
        said += rule.update(frame(10 * i, reading([value])))
        for bad in (math.nan, math.inf, -1.0):
            assert not rule.update(frame(10 * i + 3, reading([bad])))
    assert said == [v for v in clean if v is not None]


def test_it_stays_while_the_value_is_beyond_and_ends_when_it_falls() -> None:
    said = feed(
        Forecast("user/x", limit=1e3), [2.0 * 1.2**i for i in range(38)] + [2000.0] * 3 + [50.0] * 3, every=10
    )
    assert active_at(said)[-1] == 41  # the first fall is not yet the end
    assert said[40] is not None
    assert said[40].steps_to_limit == (0.0, 0.0, 0.0)
    assert said[42] is not None
    assert not said[42].active


def test_the_cell_that_crosses_first_is_told_and_cells_may_join() -> None:
    rule = Forecast("user/x", limit=1e3)
    said: list[Verdict] = []
    for i in range(24):
        names = "ab" if i < 8 else "cab"
        rates = {"a": 1.25, "b": 1.0, "c": 1.1}
        said = list(
            rule.update(frame(10 * i, reading([4 * rates[n] ** i for n in names], X, Cells.along("place", names))))
        )
    assert [str(v.cell) for v in said] == ["a"]


def test_a_burst_of_samples_does_not_push_the_past_out_of_the_window() -> None:
    rule, evidence = Forecast("user/x", limit=1e3), ""
    for step in [*range(0, 1000, 10), *range(1000, 1021)]:
        for verdict in rule.update(frame(step, reading([math.exp(step / 200)]))):
            evidence = verdict.evidence
    told = re.search(r"(\d+) samples of the last (\d+) steps", evidence)
    assert told is not None
    assert int(told[1]) <= 45
    assert int(told[2]) >= 480  # the window is 510


def test_lines_agree_with_polyfit() -> None:
    rng = np.random.default_rng(1)
    x, y = np.sort(rng.uniform(-50, 0, 12)), rng.normal(size=(12, 5))
    y[3, 2] = y[7, 2] = np.nan
    lines = fit_lines(x, y)
    for cell in range(5):
        there = np.isfinite(y[:, cell])
        (slope, offset), residual, *_ = np.polyfit(x[there], y[there, cell], 1, full=True)
        assert lines.slope[cell] == pytest.approx(slope)
        assert lines.y_mean[cell] - lines.slope[cell] * lines.x_mean[cell] == pytest.approx(offset)
        assert lines.error[cell] ** 2 == pytest.approx(residual[0] / (there.sum() - 2))
        assert lines.fit[cell] == pytest.approx(np.corrcoef(x[there], y[there, cell])[0, 1] ** 2)


@pytest.mark.parametrize("given", [{"limit": 0.0}, {"limit": math.inf}, {"limit": 1.0, "min_samples": 2}])
def test_wrong_arguments_raise(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"limit must be|min_samples must be"):
        Forecast("user/x", **given)  # type: ignore[arg-type]


def test_nothing_is_foretold_once_a_cell_has_passed_the_limit() -> None:
    growing = FAILING[:6]  # foretold by itself ...
    assert any(feed(Forecast("user/x", limit=1000.0), growing, every=10))
    rule = Forecast("user/x", limit=1000.0)  # ... and not beside a cell that is there
    assert not any(rule.update(frame(10 * i, reading([value, 2000.0]))) for i, value in enumerate(growing))
