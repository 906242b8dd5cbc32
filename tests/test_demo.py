"""The demo: its model and data, what counts as leaving the band, and the story it tells of a real run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from typer.testing import CliRunner

from traindiag.alerts.alert import Alert
from traindiag.cli import app
from traindiag.demo.band import Band, onset, smooth
from traindiag.demo.data import Windows, standard_library
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.demo.run import HEALTHY_LR, UNSTABLE_LR, Outcome, Settings, train
from traindiag.demo.story import Story

BAND = Band.load()
SETTINGS = Settings(lr=UNSTABLE_LR)
losses = st.lists(st.floats(0, 10), min_size=1, max_size=40)


# -- model and data ----------------------------------------------------------------------------


def test_model_sees_only_the_past() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, heads=2, context=12)).double()
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


def test_query_key_norm_bounds_the_logits() -> None:
    model = GPT(GPTConfig(layers=1, width=32, heads=2, context=8, qk_norm=True))
    query = model.blocks[0].attention.query_norm(torch.randn(1, 2, 8, 16) * 1e4)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(query.norm(dim=-1), torch.full((1, 2, 8), 4.0), rtol=1e-3, atol=0)


def test_loss_is_cross_entropy_plus_z_loss() -> None:
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64) * 3, torch.randint(7, (2, 5))
    z = logits.numpy()
    log_z = np.log(np.exp(z).sum(-1))
    picked = np.take_along_axis(z, targets.numpy()[..., None], -1)[..., 0]
    loss, total = next_token_loss(logits, targets, z_loss=0.01)
    assert loss.item() == pytest.approx((log_z - picked).mean(), rel=1e-12)
    assert total.item() == pytest.approx((log_z - picked).mean() + 0.01 * (log_z**2).mean(), rel=1e-12)


def test_text_is_the_same_each_time_and_the_parts_share_no_file() -> None:
    train_text, validation_text = standard_library()
    assert torch.equal(train_text, standard_library()[0])
    assert len(train_text) > 1_000_000
    whole = bytes(train_text.numpy())
    held_out = bytes(validation_text.numpy())
    middle = held_out[len(held_out) // 2 :][:2000]
    assert middle not in whole


def test_python_without_sources_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found 0 \.py files"):
        standard_library(tmp_path)


def test_windows_are_drawn_without_the_global_generator() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    state = torch.get_rng_state()
    first, again, other = (Windows(text, 50, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.starts == again.starts != other.starts
    assert all(torch.equal(first[i][1], first[i][0] + 1) for i in range(len(first)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 40}, "width must be a multiple of 16.*got 40"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"steps": 0}, "steps must be positive, got 0"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **wrong)  # type: ignore[arg-type]


# -- the band ----------------------------------------------------------------------------------


@given(losses, st.sampled_from([1, 3, 11]))
def test_smoothing_is_the_mean_of_the_nearest_steps(values: list[float], window: int) -> None:
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-9, atol=1e-9)


@given(losses, st.floats(0, 2))
def test_onset_is_the_start_of_the_last_stay_outside(values: list[float], margin: float) -> None:
    outside = [value > 5 + margin for value in values]
    stays = [i for i in range(len(values)) if all(outside[i:])]
    assert onset(values, [5.0] * len(values), window=1, margin=margin) == (stays[0] if stays else None)


def test_a_loss_that_is_no_number_is_outside() -> None:
    assert onset([1.0, 1.0, math.nan, math.nan], [2.0] * 4, window=1, margin=0.0) == 2


def test_runs_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="each of the 3 steps of the band, got 2"):
        onset([1.0, 1.0], [1.0] * 3, window=1, margin=0.0)


def test_stored_band_is_that_of_the_demo_itself() -> None:
    defaults = Settings(lr=HEALTHY_LR)
    shape = ("layers", "width", "steps", "batch", "context", "lr")
    assert [getattr(BAND, name) for name in shape] == [getattr(defaults, name) for name in shape]
    assert len(BAND.upper) == BAND.steps
    assert len(BAND.seeds) == len(BAND.validation) == 5
    assert {"date", "machine", "python", "torch", "lightning"} <= set(BAND.measured)


def test_stored_band_begins_where_the_demo_begins() -> None:
    """A changed model, data or schedule must not be compared with an old band."""

    class StopEarly(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: object) -> None:
            trainer.should_stop = trainer.global_step >= 30

    run = train(Settings(lr=HEALTHY_LR), [StopEarly()])
    begun = smooth(run.losses, BAND.window)[:25]
    above = begun - BAND.upper[:25]
    assert above.max() < BAND.margin
    assert above.min() > -0.6  # the spread of five seeds in the steep first steps


# -- the story ---------------------------------------------------------------------------------


def an_alert(step: int, **changes: object) -> Alert:
    alert = Alert(
        id="a", status="opened", rule="r", run="x", segment=0, step=step, time=0.0, rank=None, severity="warning",
        clock="slow", family="attention", signal="attention/logit_range", where="model.blocks.0.attention head 1",
        value=1234.5, limit=1000.0, kind="threshold",
    )  # fmt: skip
    return replace(alert, **changes)  # type: ignore[arg-type]


def an_outcome(values: list[float], **changes: object) -> Outcome:
    return Outcome(replace(SETTINGS, **changes), tuple(values), 2.75, 1.0, None)  # type: ignore[arg-type]


def leaving_at(step: int) -> list[float]:
    """Losses on the edge of the band, and 1 nat above it from ``step`` on."""
    return [value + (i >= step) for i, value in enumerate(BAND.upper)]


def test_story_of_a_damaged_run() -> None:
    story = Story.of(an_outcome(leaving_at(100)), [an_alert(30), an_alert(40)], BAND)
    told = dict(story.lines())
    # a centred window of 11 sees the jump up to 5 steps early; the margin takes one of the five back
    assert story.onset is not None
    assert 95 <= story.onset <= 100
    assert story.lead == story.onset - 30
    assert "step 30" in told["warned"]
    assert "1,234" in told["warned"] or "1,235" in told["warned"]
    assert told["lead"] == f"{story.lead} steps"
    mean = sum(BAND.validation) / 5
    assert told["at the end"].startswith("damaged, not diverged")
    assert told["at the end"].endswith(f"{2.75 - mean:.2f} worse than their mean")


def test_story_of_a_warning_that_came_too_late() -> None:
    story = Story.of(an_outcome(leaving_at(100)), [an_alert(300)], BAND)
    assert story.lead is not None
    assert story.lead < 0
    assert "too late" in dict(story.lines())["lead"]


def test_story_of_a_healthy_run() -> None:
    story = Story.of(an_outcome(list(BAND.upper)), [an_alert(30, severity="info")], BAND)
    told = dict(story.lines())
    assert story.fate == "healthy"
    assert story.lead is None
    assert told["warned"] == "never: nothing at WARNING or above in 400 steps"
    assert "inside" in told["loss"]
    assert "lead" not in told


@pytest.mark.parametrize("end", [math.nan, math.inf, 50.0])
def test_story_of_a_diverged_run(end: float) -> None:
    values = [*BAND.upper[:380], *[end] * 20]
    assert Story.of(an_outcome(values), [], BAND).lines()[-1][1].startswith("diverged: ")


def test_no_lead_is_invented_where_no_band_was_measured() -> None:
    story = Story.of(an_outcome(leaving_at(100), layers=5), [an_alert(30)], BAND)
    told = dict(story.lines())
    assert story.onset is None
    assert story.lead is None
    assert "no healthy runs were measured for 5 layers of width 64 over 400 steps" in told["loss"]
    assert "lead" not in told


def test_another_rate_and_query_key_norm_keep_the_band() -> None:
    outcome = an_outcome(list(BAND.upper), lr=0.05, qk_norm=True, z_loss=1e-4, seed=7)
    assert Story.of(outcome, [], BAND).band is BAND


# -- the command -------------------------------------------------------------------------------


def test_healthy_and_a_rate_exclude_each_other() -> None:
    done = CliRunner().invoke(app, ["demo", "--healthy", "--lr", "0.1"])
    assert done.exit_code == 2
    assert "leave out --lr or --healthy" in done.output


def test_wrong_width_is_told_by_the_command() -> None:
    done = CliRunner().invoke(app, ["demo", "--width", "40"])
    assert done.exit_code == 2
    assert "multiple of 16" in done.output


def test_training_is_the_same_with_and_without_a_log(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=4, layers=1, width=16, batch=2, context=16)
    bare, logged = train(settings), train(settings, log_root=tmp_path)
    assert (bare.losses, bare.validation) == (logged.losses, logged.validation)
    assert bare.log_dir is None
    assert logged.log_dir is not None
    assert list(logged.log_dir.glob("events.out.tfevents.*"))


def the_demo(tmp_path: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "traindiag", "demo", "--log-dir", str(tmp_path / "a b"), *options],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("What happened")[1]


def test_demo_warns_before_the_loss_shows_it(tmp_path: Path) -> None:
    """One seed of the claim, as its user sees it; more seeds are a benchmark."""
    story = the_demo(tmp_path)
    assert int(story.split("lead")[1].split()[0]) >= 20
    assert "damaged, not diverged" in story
    assert f"tensorboard --logdir '{tmp_path}/a b/version_0'" in story
    assert list((tmp_path / "a b" / "version_0").glob("events.out.tfevents.*"))


def test_healthy_demo_is_silent(tmp_path: Path) -> None:
    story = the_demo(tmp_path, "--healthy")
    assert "never: nothing at WARNING or above in 400 steps" in story
    assert "ended inside the band" in story


def test_short_demo_claims_no_lead(tmp_path: Path) -> None:
    story = the_demo(tmp_path, "--steps", "20")
    assert "no healthy runs were measured" in story
    assert "\nlead" not in story
