"""Continual metrics against naive loops over lists, written from the definitions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traindiag.record.continual import Continual, Gap, Swings, baseline_of, noise_of

values = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=40)


@settings(deadline=None)
@given(values, st.integers(2, 12), st.booleans())
def test_windowed_swings_are_the_largest_over_all_pairs_within_a_window(
    series: list[float], window: int, higher: bool
) -> None:
    swings = Swings(higher, windows=(window,))
    for value in series:
        swings.push(value)
    fall = rise = 0.0
    for m in range(len(series)):
        for n in range(m + 1, min(m + window, len(series))):  # m and n among `window` consecutive evaluations
            change = series[m] - series[n]
            fall, rise = max(fall, change if higher else -change), max(rise, -change if higher else change)
    assert swings.fall[window] == pytest.approx(fall) and swings.rise[window] == pytest.approx(rise)


def naive(tasks: list[str], history: list[dict[str, float]], switches: list[tuple[int, str]], first: str) -> dict:
    """De Lange et al. (2023) for a stream of evaluations; ``switches`` are places in it with the task that begins."""
    current, learned, at = first, {}, dict(switches)
    for n in range(len(history)):
        if n in at:
            learned[current] = n
            current = at[n]
    if not learned:
        return {}
    now = history[-1]
    minima = [min(h[i] for h in history[n:]) for i, n in learned.items()]
    ends = [n - 1 for n, _ in switches]
    worst = sum(minima) / len(minima)
    k = len(learned) + 1
    return {
        "min_acc": worst,
        "wc_acc": now[current] / k + (1 - 1 / k) * worst,
        "forgetting": np.mean([max(history[t][i] for t in ends if t >= n - 1) - now[i] for i, n in learned.items()]),
        "backward_transfer": np.mean([now[i] - history[n - 1][i] for i, n in learned.items()]),
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_of_tasks_is_measured_as_published(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks = ["a", "b", "c", "d"]
    history = [{t: float(v) for t, v in zip(tasks, rng.random(4))} for _ in range(40)]
    switches = [(11, "b"), (19, "c"), (30, "d")]
    run = Continual(tasks, current="a")
    for n, evaluation in enumerate(history):
        for place, task in switches:
            if place == n:
                run.turn(n, task)
        run.evaluate(n, evaluation, dict.fromkeys(tasks, 100.0))
        expected = naive(tasks, history[: n + 1], [s for s in switches if s[0] <= n], "a")
        found = run.summary()
        assert {k: found[k] for k in expected} == pytest.approx(expected)
        assert ("min_acc" in found) == bool(expected)  # undefined before anything is learned: absent, not 0


def test_a_loss_is_an_accuracy_upside_down() -> None:
    rng = np.random.default_rng(0)
    accuracy, loss = Continual(["a", "b"], current="a"), Continual(["a", "b"], False, current="a")
    for n in range(30):
        if n == 15:
            accuracy.turn(n, "b"), loss.turn(n, "b")
        a, b = rng.normal(size=2)  # no share: floors and limits are those of the level
        accuracy.evaluate(n, {"a": a, "b": b}, {"a": 9, "b": 9})
        loss.evaluate(n, {"a": -a, "b": -b}, {"a": 9, "b": 9})
    up, down = accuracy.summary(), loss.summary()
    for name in ("wf_10", "wf_100", "wp_10", "wp_100", "forgetting", "backward_transfer"):
        assert up[name] == pytest.approx(down[name])
    for name in ("min_acc", "wc_acc"):
        assert up[name] == pytest.approx(-down[name])
    assert accuracy.gaps["a"].depth == pytest.approx(loss.gaps["a"].depth)


def oracle(series: list[float], baseline: float, noise: float, share: bool) -> dict:
    """The facts of a gap at its last evaluation, by looking at all of them at once."""
    gaps = [baseline - v for v in series]
    scale = 1.0 if share else abs(baseline)
    limit = max(3 * noise, 0.02 * scale)
    opened = next((t for t in range(1, len(gaps)) if gaps[t] > limit and gaps[t - 1] > limit), None)
    depth = max([0.0, *gaps])
    trough = gaps.index(depth) if depth > 0 else None
    closed = max(0.1 * depth, 3 * noise, 0.01 if share else 0.0)
    recovery = None
    if opened is not None and trough is not None:
        begin = max(trough, opened) + 1
        for t in range(begin, len(gaps) - 2):
            if all(g <= closed for g in gaps[t : t + 3]):
                recovery = t
                break
    residual = sum(gaps[-20:]) / len(gaps[-20:])
    return {
        "depth": depth,
        "trough": trough,
        "opened": opened,
        "recovery": recovery,
        "slope": (gaps[5] - gaps[0]) / 5 if len(gaps) > 5 else None,
        "residual": residual,
        "area": sum(max(g, 0.0) for g in gaps),
        "recovered": None if opened is None else 1 - residual / depth,
    }


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("depth", [0.005, 0.1, 0.4])
@pytest.mark.parametrize("back", [5.0, 30.0, 1e9])
def test_the_facts_of_a_gap(share: bool, depth: float, back: float) -> None:
    rng = np.random.default_rng(3)
    series = []
    gap = Gap(100, 0.9, 0.002, share=share)
    for t in range(120):
        fall = depth * (1 - math.exp(-t / 3)) * math.exp(-t / back)
        series.append(float(0.9 - fall + 0.001 * rng.normal()))
        gap.push(100 + t, series[-1])
        found = {name: getattr(gap, name) for name in oracle(series, 0.9, 0.002, share)}
        for name, value in oracle(series, 0.9, 0.002, share).items():
            assert found[name] == (value if value is None else pytest.approx(value)), (t, name)
    assert gap.verdict == ("none" if depth < 0.01 else "transient" if back < 100 else "open")
    assert gap.relative_depth == pytest.approx(gap.depth / 0.9)


@pytest.mark.parametrize(("left", "verdict"), [(1.0, "forgetting"), (0.6, "forgetting"), (0.4, "partial")])
def test_what_has_not_come_back_after_500_steps(left: float, verdict: str) -> None:
    gap = Gap(0, 2.0, 0.001, higher_is_better=False)
    for step in range(0, 501, 10):
        gap.push(step, 2.0 + 0.5 * (1 - (1 - left) * min(1, step / 200)))
        assert gap.verdict == (verdict if step >= 500 else "none" if step < 10 else "open")


def test_what_slides_away_again_is_open_again() -> None:
    gap = Gap(0, 1.0, 0.001, higher_is_better=False)
    for step, loss in enumerate([1.5, 1.5, 1.0, 1.0, 1.0]):
        gap.push(step, loss)
    assert gap.verdict == "transient"
    gap.push(5, 1.2)
    gap.push(6, 1.2)
    assert gap.verdict == "open" and gap.recovery is None


def test_a_call_comes_with_the_fifth_evaluation_and_is_taken_back() -> None:
    gap = Gap(0, 2.0, 0.001, higher_is_better=False)
    said = []
    for step in range(200):
        gap.push(step, 2.0 + 0.6 * (1 - math.exp(-step / 4)) * math.exp(-max(0, step - 30) / 20))
        said.append(gap.likely)
    assert said[:4] == [None] * 4 and said[4] == "forgetting"  # a fall by a fifth that does not slow
    assert said[-1] == "transient" and gap.verdict == "transient"


def test_a_baseline_is_what_was_just_before() -> None:
    steps = list(range(0, 2000, 10))
    assert baseline_of(steps, [float(s) for s in steps], 2000) == np.mean(steps[-20:])
    assert baseline_of([0, 1000, 2000], [5.0, 3.0, 1.0], 2001) == 3.0  # the last three, however old
    assert baseline_of([7], [0.25], 8) == 0.25


def test_noise_is_that_of_differences_whatever_the_drift() -> None:
    rng = np.random.default_rng(0)
    found = [noise_of(list(0.1 * np.arange(20) + rng.normal(0, 0.5, 20)), 1.0, None) for _ in range(400)]
    assert np.mean(found) == pytest.approx(0.5, rel=0.05)
    assert noise_of([0.9] * 20, 0.9, 400.0) == 0.5 / 20 and noise_of([2.0] * 20, 2.0, None) == 0.002


def test_nan_is_no_evaluation() -> None:
    run = Continual(["a"], False)
    for step in range(10):
        run.evaluate(step, {"a": 1.0}, {"a": 4.0})
    run.turn(10)
    for step in range(10, 20):
        run.evaluate(step, {"a": math.nan}, {"a": 4.0})
    assert run.gaps["a"].evaluations == 0 and "min_acc" not in run.summary()


def test_gaps_of_earlier_shifts_are_kept() -> None:
    run = Continual(["a"], False)
    for step in range(60):
        if step in (10, 40):
            run.turn(step)
        run.evaluate(step, {"a": 1.5 if 10 <= step < 14 else 1.0}, {"a": 4})
    (first,) = run.earlier
    assert (first["a"].shift, first["a"].verdict, run.gaps["a"].verdict) == (10, "transient", "none")


def test_without_an_evaluation_before_it_a_shift_has_no_gap() -> None:
    run = Continual(["a"])
    run.turn(0)
    run.evaluate(0, {"a": 0.1}, {"a": 10})
    assert not run.gaps and "forgetting" not in run.summary()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=30, max_size=30), st.integers(1, 29))
def test_a_state_goes_on_as_if_nothing_had_been(series: list[float], cut: int) -> None:
    def feed(run: Continual, begin: int, end: int) -> None:
        for step in range(begin, end):
            if step in (10, 20):
                run.turn(step, "b" if step == 10 else None)
            run.evaluate(step, {"a": series[step], "b": 1 - series[step]}, {"a": 50, "b": 50})

    whole, first, second = (Continual(["a", "b"]) for _ in range(3))
    feed(whole, 0, 30)
    feed(first, 0, cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, cut, 30)
    assert whole.state_dict() == second.state_dict() and whole.summary() == second.summary()
