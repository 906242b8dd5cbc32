"""Fates and onsets on loss curves whose story is known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.early_warning.fates import Fate, Floats, Losses, Scale, judge, judge_all, protocol, running_median

ROOT = Path(__file__).parents[2]
STEPS = 400
RULES = protocol()["fate"]
SCALE = Scale(initial=5.0, final=1.0, seeds=8)  # D is 4, so the limits are .1 and .4


def control() -> Floats:
    """Falls from 5 to 1 and stays there."""
    return 1 + 4 * np.exp(-np.arange(STEPS) / 30)


def noisy(losses: Floats, seed: int = 0) -> Floats:
    return losses + 0.03 * np.random.default_rng(seed).standard_normal(len(losses))


def fate(losses: Floats, cut: float = RULES["cut"]) -> Fate:
    return judge(losses, control(), SCALE, RULES, cut)


def ramp(start: int, stop: int, height: float) -> Floats:
    """0 up to ``start``, then a straight line to ``height`` at ``stop``, then flat."""
    return np.interp(np.arange(STEPS), [start, stop], [0, height])


def step_up(at: int, height: float) -> Floats:
    return np.where(np.arange(STEPS) >= at, height, 0.0)


def test_a_run_like_its_control_is_healthy() -> None:
    found = fate(noisy(control()))
    assert found.fate == "healthy"
    assert (found.strict, found.material) == (None, None)
    assert abs(found.tail_excess) < 0.01


def test_tail_excess_is_a_share_of_the_drop() -> None:
    assert fate(control() + step_up(200, 0.2)).tail_excess == pytest.approx(0.05)


@pytest.mark.parametrize(("excess", "told"), [(0.09, "healthy"), (0.11, "grey"), (0.39, "grey"), (0.41, "degraded")])
def test_limits_of_healthy_and_grey(excess: float, told: str) -> None:
    assert fate(control() + step_up(200, excess)).fate == told


def test_a_slow_decline_is_degraded_from_where_it_crossed() -> None:
    """The rise is .1 at step 110 and .4 at step 140: the two onsets."""
    found = fate(control() + ramp(100, 300, 2.0))
    assert found.fate == "degraded"
    assert found.strict == pytest.approx(110, abs=2)
    assert found.material == pytest.approx(140, abs=2)


def test_a_run_that_only_lags_is_slow() -> None:
    """It learns a seventh as fast; its excess shrinks from where it has covered a quarter of the drop."""
    found = fate(1 + 4 * np.exp(-np.arange(STEPS) / 200))
    assert found.tail_excess > RULES["cut"]
    assert (found.fate, found.material) == ("slow", None)


def test_a_loss_above_that_at_initialisation_is_diverged() -> None:
    found = fate(control() + step_up(250, 6.0))
    assert (found.fate, found.strict, found.material) == ("diverged", 250, 250)


def test_a_short_blow_up_is_not_diverged() -> None:
    """Five steps are less than the window of eleven; they are a spike that was recovered from."""
    excess = np.zeros(STEPS)
    excess[250:255] = 6.0
    found = fate(control() + excess)
    assert (found.fate, found.material, found.strict) == ("spiked", 250, 250)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_single_non_finite_loss_is_diverged(value: float) -> None:
    losses = control()
    losses[123] = value
    run = Losses("run", losses, STEPS, 10, "control", "reference")
    found = fate(run.whole())
    assert (found.fate, found.material, found.strict) == ("diverged", 123, 123)


def test_non_finite_at_the_latest_but_earlier_where_the_rise_was_earlier() -> None:
    losses = control() + ramp(100, 140, 4.0)
    losses[200:] = np.nan
    found = fate(Losses("run", losses, STEPS, 10, "control", "reference").whole())
    assert found.fate == "diverged"
    assert found.material is not None and 100 < found.material < 120


def test_a_run_that_was_ended_is_non_finite_from_there() -> None:
    run = Losses("run", control()[:150], STEPS, 10, "control", "reference")
    found = fate(run.whole())
    assert (found.fate, found.material) == ("diverged", 150)


def test_a_run_that_never_learned_is_stuck_from_where_the_control_left_it() -> None:
    """The control is .4 below its beginning after 3.2 steps; medians see it a few steps later."""
    found = fate(noisy(np.full(STEPS, 5.0)))
    assert found.fate == "stuck"
    assert found.material is not None and found.material < 15


def test_bad_from_the_first_step_has_onset_zero() -> None:
    found = fate(20 - ramp(0, STEPS, 10.0))
    assert (found.fate, found.strict, found.material) == ("stuck", 0, 0)


def test_strict_onset_is_the_last_crossing() -> None:
    """A bump that passes again is not the beginning of what comes a hundred steps later."""
    bump = np.where((np.arange(STEPS) >= 100) & (np.arange(STEPS) < 130), 0.2, 0.0)
    found = fate(control() + bump + ramp(200, 300, 2.0))
    assert found.fate == "degraded"
    assert found.strict == pytest.approx(205, abs=2)


def test_a_rise_that_does_not_last_is_no_material_onset() -> None:
    """Nineteen steps are less than 5 % of 400."""
    bump = np.where((np.arange(STEPS) >= 150) & (np.arange(STEPS) < 169), 1.0, 0.0)
    assert fate(control() + bump + ramp(300, 320, 1.0)).material == pytest.approx(308, abs=2)


@pytest.mark.parametrize(
    ("steps", "told"), [((100, 105), "healthy"), ((100, 105, 110), "spiked"), ((100, 105, 113), "healthy")]
)
def test_a_spike_is_three_steps_of_one_window(steps: tuple[int, ...], told: str) -> None:
    excess = np.zeros(STEPS)
    excess[list(steps)] = 2.0
    assert fate(control() + excess).fate == told


def test_a_batch_that_is_hard_for_everyone_is_no_spike() -> None:
    hard = np.zeros(STEPS)
    hard[[100, 200, 300, 301]] = 3.0
    assert judge(control() + hard, control() + hard, SCALE, RULES, RULES["cut"]).fate == "healthy"


def test_other_cuts_move_the_limit() -> None:
    worse = control() + step_up(200, 0.3)
    assert [fate(worse, cut).fate for cut in (0.05, 0.1, 0.2)] == ["degraded", "grey", "grey"]


def test_windows_follow_the_run() -> None:
    """A bump of 100 steps is smoothed away from 10,000 steps, whose window is 301."""
    steps = 10_000
    bump = np.where((np.arange(steps) >= 5000) & (np.arange(steps) < 5100), 8.0, 0.0)
    flat = 1 + 4 * np.exp(-np.arange(steps) / 300)
    assert judge(flat + bump, flat, SCALE, RULES, RULES["cut"]).fate == "spiked"


def test_running_median_of_infinite_values() -> None:
    assert running_median(np.array([1.0, np.inf, 2.0, np.inf, np.inf]), 3).tolist()[1:] == [2, np.inf, np.inf, np.inf]


def test_scale_of_controls() -> None:
    runs = [Losses(str(i), control() + i, STEPS, 10, str(i), "reference") for i in range(3)]
    scale = Scale.of(runs, RULES["tail"])
    assert (scale.initial, scale.seeds) == (6.0, 3)
    assert scale.final == pytest.approx(2.0, abs=1e-3)


def test_a_control_that_broke_is_refused() -> None:
    broken = Losses("broken", np.full(STEPS, np.nan), STEPS, 10, "broken", "reference")
    with pytest.raises(ValueError, match="broken"):
        Scale.of([broken], RULES["tail"])


def runs() -> dict[str, Losses]:
    """A control, a run that fails half-way, its twins, and an injected fault."""
    base = Losses("control", control(), STEPS, 10, "control", "reference")
    failing = dataclasses.replace(base, name="failing", losses=control() + ramp(200, 300, 2.0), kind="ladder")

    def twin(cure: str, losses: Floats) -> Losses:
        return dataclasses.replace(failing, name=f"failing+{cure}", losses=losses, cure=cure, cure_of="failing")

    injected = dataclasses.replace(failing, name="injected", kind="nan", injected_at=200)
    every = [
        base,
        failing,
        twin("qk_norm", control()),
        twin("z_loss", control() + ramp(200, 300, 1.9)),
        twin("lower_lr", control()),
        injected,
    ]
    return {run.name: run for run in every}


def test_the_right_family_is_the_one_whose_remedy_works() -> None:
    told = judge_all(runs(), protocol())
    assert told["failing"]["fate"] == "degraded"
    assert told["failing"]["families"] == ["attention"]
    assert {c: t["works"] for c, t in told["failing"]["cures"].items()} == {
        "qk_norm": True,
        "z_loss": False,
        "lower_lr": True,
    }
    assert told["failing"]["cures"]["qk_norm"]["strict"] == told["failing"]["strict"]
    assert told["control"]["families"] == []
    assert told["injected"]["families"] == ["injected"] and told["injected"]["clock"] == "injected"


def test_where_only_a_lower_learning_rate_works_the_optimizer_is_right() -> None:
    every = runs()
    every["failing+qk_norm"] = dataclasses.replace(every["failing+qk_norm"], losses=every["failing"].losses)
    assert judge_all(every, protocol())["failing"]["families"] == ["optimizer"]


def test_two_thirds_less_is_cured() -> None:
    every = runs()
    for share, works in ((0.3, True), (0.4, False)):
        losses = control() + share * ramp(200, 300, 2.0)
        every["failing+qk_norm"] = dataclasses.replace(every["failing+qk_norm"], losses=losses)
        assert judge_all(every, protocol())["failing"]["cures"]["qk_norm"]["works"] is works


@pytest.mark.parametrize(("stretch", "start", "clock"), [(1, 200, "fast"), (3, 600, "slow"), (3, 100, "fast")])
def test_clocks(stretch: int, start: int, clock: str) -> None:
    """Slow is an onset after warm-up and a fifth of the run, in a run of at least 1,000 steps."""
    steps = stretch * STEPS
    flat = 1 + 4 * np.exp(-np.arange(steps) / 30)
    base = Losses("control", flat, steps, 10, "control", "reference")
    worse = flat + np.interp(np.arange(steps), [start, start + 50], [0, 2.0])
    told = judge_all({"control": base, "run": dataclasses.replace(base, name="run", losses=worse)}, protocol())
    assert told["run"]["clock"] == clock
    told = judge_all(
        {"control": base, "run": dataclasses.replace(base, name="run", losses=worse, warmup=steps)}, protocol()
    )
    assert told["run"]["clock"] == "fast"


def test_a_control_that_is_missing_is_told() -> None:
    every = runs()
    del every["control"]
    with pytest.raises(ValueError, match="control"):
        judge_all(every, protocol())


def test_losses_are_read_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(
            {"name": "run", "losses": [1.5, None], "steps": 3, "warmup": 1, "control": "run", "reference": "r"}
        )
    )
    run = Losses.read(path)
    assert run.losses.tolist() == [1.5, np.inf]
    assert run.whole()[0] == 1.5 and (run.whole()[1:] > 1e29).all()


def test_fates_can_see_no_signal() -> None:
    """Neither the package that measures nor anything that could read its logs is imported."""
    code = (
        "import sys, benchmarks.early_warning.fates;"
        "print([m for m in ('torch', 'traindiag', 'tensorboard', 'google.protobuf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
