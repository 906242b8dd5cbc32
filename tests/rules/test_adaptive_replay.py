"""The controller of the replay ratio, against the published algorithm written in plain Python."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rules.frames import frame
from traindiag import AdaptiveReplayRatio
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.record.series import History

_FAUS = st.sampled_from([0.0, 0.1, 0.3, 0.3004, 0.3008, 0.5, 0.5005, 0.501, 0.6])


def published(faus: list[float], interval: int, tau: float, window: int, healthy: float) -> int | None:
    """Step of the switch where ``faus[t]`` is the FAU at environment step t, one a step."""
    for t in range(interval, len(faus), interval):
        now = np.mean(faus[t - window : t])
        before = faus[0] if t == interval else np.mean(faus[t - interval - window : t - interval])
        if abs(now - before) < tau and now >= healthy * faus[0]:
            return t
    return None


def run(replay: AdaptiveReplayRatio, faus: list[float], first: int = 0) -> list[float]:
    return [replay.update(fau, env_step=first + t) for t, fau in enumerate(faus)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(_FAUS, st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.8]),
)
def test_switch_is_that_of_the_algorithm(
    stretches: list[tuple[float, int]], interval: int, window: int, healthy: float
) -> None:
    faus = [fau for fau, length in stretches for _ in range(length)]
    window = min(window, interval)
    replay = AdaptiveReplayRatio(interval=interval, window=window, healthy=healthy)
    ratios = run(replay, faus)
    expected = published(faus, interval, 0.001, window, healthy)
    assert replay.switched_at == expected
    assert ratios == [2.0 if expected is not None and t >= expected else 0.5 for t in range(len(faus))]


def test_flat_dead_critic_keeps_the_low_ratio() -> None:
    dead = [0.5] * 10 + [0.02] * 200
    with_level, as_published = AdaptiveReplayRatio(interval=20), AdaptiveReplayRatio(interval=20, healthy=0.0)
    run(with_level, dead)
    run(as_published, dead)
    assert (with_level.ratio, with_level.switched_at) == (0.5, None)
    assert with_level.level == pytest.approx(0.04) and with_level.change == pytest.approx(0.0)
    assert (as_published.ratio, as_published.switched_at) == (2.0, 60)


def test_fall_and_recovery_switches_once_recovered() -> None:
    fall, back = np.linspace(0.5, 0.3, 100), np.linspace(0.3, 0.46, 100)
    replay = AdaptiveReplayRatio(interval=20)
    run(replay, [*fall, *back, *[0.46] * 100])
    assert replay.switched_at == 240  # the mean of 220-240 is that of 200-220


def test_switch_is_for_good() -> None:
    replay = AdaptiveReplayRatio(interval=5)
    run(replay, [0.5] * 10)
    assert replay.switched_at == 5
    assert set(run(replay, [0.5] + [0.01] * 50, first=10)) == {2.0}


def test_too_few_values_decide_nothing_and_nor_does_the_window_after_them() -> None:
    replay = AdaptiveReplayRatio(interval=10, min_values=3)
    for step in (0, 5, *range(10, 41)):  # two values before step 10: no mean there to hold the next one against
        replay.update(0.5, env_step=step)
        assert replay.switched_at == (30 if step >= 30 else None), step


def test_interval_that_was_not_seen_decides_nothing() -> None:
    replay = AdaptiveReplayRatio(interval=10)
    falling = [0.5] * 10 + [0.4]
    run(replay, falling)
    for step in (35, 36):  # step 20 and 30 went by
        replay.update(0.4, env_step=step)
    replay.update(0.4, env_step=40)
    assert replay.switched_at == 10, "0.5 against the first 0.5"
    late = AdaptiveReplayRatio(interval=10)
    for step, fau in ((0, 0.5), (5, 0.48), (35, 0.49), (40, 0.49), (50, 0.49)):
        late.update(fau, env_step=step)  # what was before step 10 is not what was before step 30
    assert late.switched_at == 50


@given(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 1e-3]), st.lists(st.integers(0, 7), min_size=1, max_size=300))
def test_updates_add_up_exactly(ratio: float, steps: list[int]) -> None:
    replay = AdaptiveReplayRatio(low=ratio, high=8)
    done = sum(replay.updates(n) for n in steps)
    assert done == (Fraction(str(ratio)) * sum(steps)).__floor__()


def test_owed_updates_survive_the_switch() -> None:
    replay = AdaptiveReplayRatio(interval=3)
    updates = []
    for step in range(6):
        replay.update(0.5, env_step=step)
        updates.append(replay.updates())
    assert updates == [0, 1, 0, 2, 2, 2] and replay.updates() == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(_FAUS, min_size=2, max_size=60), st.data())
def test_resumed_is_unbroken(faus: list[float], data: st.DataObject) -> None:
    def follow(replay: AdaptiveReplayRatio, faus: list[float], first: int) -> list[tuple[float, int]]:
        return [(replay.update(f, env_step=first + t), replay.updates()) for t, f in enumerate(faus)]

    cut = data.draw(st.integers(1, len(faus) - 1))
    unbroken, before, after = (AdaptiveReplayRatio(0.3, interval=7, window=5) for _ in range(3))
    expected = follow(unbroken, faus, 0)
    first = follow(before, faus[:cut], 0)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + follow(after, faus[cut:], cut) == expected
    assert after.state_dict() == unbroken.state_dict()


# -- fed by what is measured -------------------------------------------------------------------


def history(*values: float, modules: tuple[str, ...] = ("critic",), first: int = 0) -> History:
    made = History()
    grow(made, *values, modules=modules, first=first)
    return made


def grow(made: History, *values: float, modules: tuple[str, ...] = ("critic",), first: int = 0) -> None:
    cells = Cells.along("module", modules)
    signal = BY_NAME["plasticity/fau_pooled"]
    for i, value in enumerate(values):
        row = np.array([value, *[0.9] * (len(modules) - 1)], np.float32)
        made.append(frame(first + i, Reading(signal, cells, row, np.ones(len(modules), np.bool_))))


def test_follow_takes_every_value_once() -> None:
    replay = AdaptiveReplayRatio(interval=100, min_values=2)
    made = history(0.5, 0.25)
    assert replay.follow(made, env_step=50) == replay.follow(made, env_step=60) == 0.5
    state = replay.state_dict()
    assert (state["sum"], state["count"], state["read"]) == (0.75, 2, 1)
    grow(made, float("nan"), 0.5, first=2)
    replay.follow(made, env_step=120)
    assert replay.state_dict()["count"] == 1 and replay.state_dict()["read"] == 3


def test_follow_needs_no_values_yet() -> None:
    assert AdaptiveReplayRatio().follow(History(), env_step=0) == 0.5


def test_follow_reads_the_module_that_is_named() -> None:
    made = history(0.25, modules=("q1", "q2"))
    with pytest.raises(ValueError, match="module must be one of q1, q2: several are watched"):
        AdaptiveReplayRatio().follow(made, env_step=0)
    with pytest.raises(ValueError, match="module must be one of q1, q2, got 'q3'"):
        AdaptiveReplayRatio().follow(made, env_step=0, module="q3")
    replay = AdaptiveReplayRatio()
    replay.follow(made, env_step=0, module="q2")
    assert replay.state_dict()["first"] == pytest.approx(0.9)


# -- wrong arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"low": 0.0}, "low must be a finite float32 above 0, got 0.0"),
        ({"high": float("nan")}, "high must be a finite float32 above 0, got nan"),
        ({"low": 3.0}, "high must be at least low, got high 2.0 and low 3.0"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"interval": 2.5}, "interval must be an integer of at least 1, got 2.5"),
        ({"tau": 0.0}, "tau must be a finite float32 above 0, got 0.0"),
        ({"interval": 5, "window": 6}, "window must not be longer than interval, got 6 and 5"),
        ({"healthy": 1.5}, "healthy must be between 0 and 1, got 1.5"),
        ({"min_values": 0}, "min_values must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_told_at_construction(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AdaptiveReplayRatio(**arguments)


@pytest.mark.parametrize("fau", [-0.1, 1.1, float("nan")])
def test_what_is_no_fraction_is_refused(fau: float) -> None:
    with pytest.raises(ValueError, match="fau must be between 0 and 1"):
        AdaptiveReplayRatio().update(fau, env_step=0)


def test_time_does_not_go_back() -> None:
    replay = AdaptiveReplayRatio()
    replay.update(0.5, env_step=7)
    with pytest.raises(ValueError, match="env_step must be an integer of at least 7, got 6"):
        replay.update(0.5, env_step=6)
    with pytest.raises(ValueError, match="env_steps must be an integer of at least 0, got -1"):
        replay.updates(-1)
