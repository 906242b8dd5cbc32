"""What rules say of noise, at most the rate that their docstrings state; and of one event in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rules.frames import active_at, feed, frame, reading
from tests.rules.series import POSITIVE, Said, judge, noise
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.rule import Direction, Rule, Verdict
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.shift import Shift
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold
from traindiag.rules.trend import Trend
from traindiag.rules.vanishing import Vanishing

KINDS = ("independent", "AR(0.9)")
SKEWED = Signal("user/p", (), "a number that nobody declared positive")


def per_10k(said: Said, samples: int = 2000) -> float:
    """Times that a cell began to fail, in 10,000 of its samples."""
    return float(said.onsets.sum()) / (samples * len(said.onsets)) * 1e4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        pytest.param(Spike("user/p"), 2.0, id="spike up"),
        pytest.param(Spike("user/p", direction="both"), 4.0, id="spike both"),
        pytest.param(Shift("user/p"), 1.0, id="shift up"),
        pytest.param(Shift("user/p", direction="both"), 2.0, id="shift both"),
        pytest.param(Forecast("user/p", limit=10.0), 0.5, id="forecast"),
        pytest.param(Threshold("user/p", above=0.2, inherit=True, growth=10.0), 0.5, id="threshold growth"),
        pytest.param(Threshold("user/p", below=0.1, fallen_from=2.0, persistence=3), 0.0, id="threshold fall"),
        pytest.param(Growth("user/p", factor=8.0), 0.0, id="growth 8"),
        pytest.param(Growth("user/p", factor=4.0, samples=50, persistence=50), 0.0, id="growth of 50 samples"),
    ],
)
def test_noise_is_told_no_more_often_than_stated(rule: Rule, rate: float, kind: str) -> None:
    fresh = type(rule)(**rule.settings())
    assert per_10k(judge(fresh, noise(kind))) <= rate


@pytest.mark.parametrize(("kind", "rate"), [("independent", 0.0), ("AR(0.9)", 4.0)])
def test_growth_over_three_samples_is_told_no_more_often_than_stated(kind: str, rate: float) -> None:
    assert per_10k(judge(Growth("user/p", factor=4.0), noise(kind))) <= rate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rule",
    [Growth("user/p", factor=4.0, share=0.5), Threshold("user/p", above=4.0, share=0.5, persistence=3)],
    ids=lambda rule: type(rule).__name__,
)
def test_half_of_four_cells_is_never_told(rule: Rule, kind: str) -> None:
    series = noise(kind)
    for first in range(0, 200, 10):
        assert per_10k(judge(type(rule)(**rule.settings()), series[:, first : first + 4])) == 0


RMS_T = BY_NAME["optimizer/sentinel_rms_t"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "rate"),
    [({}, 0.0), ({"above": 5.0, "share": 0.0}, 0.1), ({"above": 2.3, "share": 0.0}, 120.0)],
    ids=lambda given: repr(given),
)
def test_a_second_moment_that_keeps_up_is_told_no_more_often_than_stated(
    kind: str, given: dict[str, float], rate: float
) -> None:
    said = judge(StaleSecondMoment(settle=0.1, **given), noise(kind), signal=RMS_T)  # type: ignore[arg-type]
    assert per_10k(said) <= rate


def drift(kind: str, sigma: float, *, samples: int = 400, sites: int = 50, gain: float = 0.0) -> tuple[float, bool]:
    """Events of a site in 10,000 of its samples, around 20 nats; and whether any of the last 20 was told."""
    level, score = 20 * noise(kind, samples, sites, 1, sigma), 2 * noise(kind, samples, sites, 2, 0.1)
    sure = np.log(noise(kind, samples, sites, 3, 0.1))
    if gain:
        level[-20:] *= np.geomspace(1.3, gain, 20)[:, None]
        sure[-20:] += 1
    rule, cells, onsets, was = OutputDrift(), Cells.along("site", [str(i) for i in range(sites)]), 0, False
    failing: set[int] = set()
    for i in range(samples):
        frames = (
            reading(level[i], "output/log_z_max_abs", cells),
            reading(score[i], "output/target_z_score", cells),
            reading(sure[i], "output/overconfidence", cells),
        )
        said = rule.update(frame(10 * i, *frames))
        now = {k for k, site in enumerate(rule._sites.values()) if site.streak >= rule.persistence}
        onsets, failing = onsets + len(now - failing), now
        was |= i >= samples - 20 and bool(said) and said[0].active
    return onsets / (samples * sites) * 1e4, was


@pytest.mark.parametrize(
    ("kind", "sigma", "rate"),
    [("independent", 0.15, 0.5), ("AR(0.9)", 0.15, 2.5), ("independent", 0.35, 2.5), ("AR(0.9)", 0.35, 55.0)],
)
def test_scattered_log_z_is_told_no_more_often_than_stated(kind: str, sigma: float, rate: float) -> None:
    assert drift(kind, sigma)[0] <= rate


@pytest.mark.parametrize("kind", KINDS)
def test_a_drift_in_scattered_log_z_is_told(kind: str) -> None:
    assert drift(kind, 0.05, samples=60, sites=1) == (0.0, False)
    assert drift(kind, 0.05, samples=60, sites=1, gain=20.0)[1]


def depth(kind: str, shrink: float = 1.0) -> list[Verdict]:
    """50 stacks of two blocks, the first one at ten times the limit for 2000 steps; it shrinks for the last 100."""
    norms = noise(kind, cells=100)
    norms *= 1e-3
    norms[:, ::2] *= 10 * Vanishing().ratio  # and below 1e-4
    norms[-100:, ::2] *= shrink
    cells = Cells(("optimizer", "block"), tuple(("adam", f"net{i}.{j}") for i in range(50) for j in range(2)))
    rule = Vanishing()
    return [v for t in range(2000) for v in rule.update(frame(t, reading(norms[t], "gradient/block_norm", cells)))]


@pytest.mark.parametrize("kind", KINDS)
def test_vanishing_is_not_told_of_a_small_first_block_and_told_of_a_shrinking_one(kind: str) -> None:
    assert depth(kind) == []
    assert 1919 <= depth(kind, 1e-3)[0].step <= 1950


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [RunInfo(), RunInfo(length=400), RunInfo(length=20_000)], ids=lambda r: str(r.length))
@pytest.mark.parametrize("every", [1, 10])
def test_noise_has_no_trend(kind: str, run: RunInfo, every: int) -> None:
    """Whatever its size, and however small the growth that is asked for."""
    for sigma in (0.05, 0.35, 1.5):
        series = noise(kind, cells=80, sigma=sigma)
        said = judge(Trend("user/p", growth_per_1000=1.01, direction="both"), series, every=every, run=run)
        assert per_10k(said) <= 2.0  # steps, not samples: one for each direction


def test_skewed_values_shift_seldom_too() -> None:
    for kind in KINDS:
        assert per_10k(judge(Shift("user/p"), noise(kind), signal=SKEWED)) <= 3.0


def test_a_second_moment_left_behind_is_told_at_once() -> None:
    series = noise("independent", 400, 100)
    series[300] = 30.0
    assert (judge(StaleSecondMoment(settle=0.1), series, signal=RMS_T).first == 300).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_each_rule_tells_its_own_event_soon(kind: str, direction: Direction) -> None:
    sign = 1 if direction == "up" else -1

    def first_after(rule: Rule, event: np.ndarray, at: int = 1000) -> np.ndarray:
        """Samples from the event to its verdict; cells that fail by chance before it are left out."""
        series = noise(kind, 2000, 100, seed=7, sigma=0.2)
        series[at:] *= np.exp(sign * event[: 2000 - at, None])
        first = judge(rule, series).first
        return np.where(first < 0, 10**6, first - at)[(first >= at) | (first < 0)]

    lone = np.zeros(1000)
    lone[0] = math.log(12)
    assert (first_after(Spike("user/p", direction=direction), lone) == 0).mean() >= 0.95
    level = np.full(1000, math.log(12))
    assert np.quantile(first_after(Shift("user/p", direction=direction), level), 0.9) <= 30
    if direction == "up":
        grown = np.log(40) * np.minimum(np.arange(1000) / 100, 1)
        assert np.quantile(first_after(Growth("user/p", factor=4.0), grown), 0.9) <= 70
        halves = first_after(Threshold("user/p", above=8.0, share=0.5, persistence=3), level)
        assert (halves <= 20).mean() >= 0.5  # share of the cells of one sample, so all of them at about the same one
    else:
        fell = first_after(Threshold("user/p", below=0.25, fallen_from=1.5, persistence=3), level)
        assert np.quantile(fell, 0.9) <= 10
    growth = np.log(5) * np.arange(1000) / 1000
    assert np.quantile(first_after(Trend("user/p", growth_per_1000=3.0, direction=direction), growth), 0.9) <= 900


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_collapse_to_nan_is_non_finite_alone_and_poisons_nothing(bad: float) -> None:
    series = noise("independent", 120, 1, seed=3)[:, 0].tolist()
    broken = [*series, *[bad] * 300]
    after = [*broken, *series, *[50.0] * 20]
    assert 120 in active_at(feed(NonFinite(), broken, POSITIVE))
    for rule in (Spike, Shift, lambda s, **k: Trend(s, growth_per_1000=1.5, **k)):
        assert not any(feed(rule("user/p", direction="both"), broken, POSITIVE))
    for rule in (Spike, Shift):
        assert 540 <= active_at(feed(rule("user/p", direction="both"), after, POSITIVE))[0] <= 544


@settings(max_examples=25, deadline=None)
@given(
    level=st.floats(1e-20, 1e20),
    flat=st.integers(20, 80),
    factor=st.sampled_from([1e-6, 1e-2, 0.1, 10.0, 1e2, 1e6]),
)
def test_a_flat_history_then_a_jump_is_told_whatever_its_size(level: float, flat: int, factor: float) -> None:
    series = [level] * flat + [level * factor] * 10
    assert active_at(feed(Spike("user/p", direction="both"), series, POSITIVE))[:1] == [flat]
    expected = [max(flat, 20) + 3]
    assert active_at(feed(Shift("user/p", direction="both", min_samples=20), series, POSITIVE)) == expected


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=30, max_size=60),
    st.lists(st.tuples(st.integers(0, 59), st.sampled_from([math.nan, math.inf, -math.inf, -1.0])), max_size=8),
)
def test_bad_values_leave_every_verdict_as_it_is(values: list[float], bad: list[tuple[int, float]]) -> None:
    """Put in between, they are neither judged nor remembered."""
    mixed: list[tuple[float, bool]] = [(v, True) for v in values]
    for at, value in sorted(bad, reverse=True):
        mixed.insert(min(at, len(mixed)), (value, False))
    for make in (
        lambda: Spike("user/p", direction="both", factor=2.0, z=1.0),
        lambda: Shift("user/p", direction="both", min_samples=16, limit=5.5, delta=0.1),
    ):
        clean = [None if v is None else (v.active, v.value, v.limit) for v in feed(make(), values, POSITIVE)]
        said = feed(make(), [v for v, _ in mixed], POSITIVE)
        kept = [None if v is None else (v.active, v.value, v.limit) for v, (_, good) in zip(said, mixed) if good]
        assert kept == clean
        assert not any(v for v, (_, good) in zip(said, mixed) if not good)
