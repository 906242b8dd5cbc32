"""The continual demo: its data and schedule, and the story it tells of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from traindiag import TrainingDiagnostics
from traindiag.cli import app
from traindiag.demo import show_continual
from traindiag.demo.continual import TASK, Phases, TwoPhases, documentation, stability_gap, train
from traindiag.demo.continual_story import HEADINGS, Story

SHORT = {"english": 90, "python": 25, "batch": 4, "context": 16}


def test_documentation_is_english_and_its_parts_share_no_topic() -> None:
    train_text, held_out = documentation()
    assert len(train_text) > 300_000 and len(held_out) > 5_000
    assert bytes(held_out[2000:4000].numpy()) not in bytes(train_text.numpy())
    assert torch.equal(train_text, documentation()[0])


def test_the_second_phase_keeps_its_share_of_english() -> None:
    english, python = torch.zeros(200, dtype=torch.uint8), torch.ones(200, dtype=torch.uint8)
    for replay, kept in ((0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)):
        data = TwoPhases(Phases(replay, english=3, python=2), english, python)
        first = [int(data[i][0][0]) for i in range(len(data))]
        assert first[: 3 * 16] == [0] * 48
        assert [first[16 * s : 16 * s + 16].count(0) for s in (3, 4)] == [kept, kept]


def test_with_and_without_replay_the_first_phase_is_the_same() -> None:
    first, second = (train(Phases(replay, **SHORT)) for replay in (0.5, 0.0))
    assert first.losses[:90] == second.losses[:90] and first.losses[91:] != second.losses[91:]


def test_the_learning_rate_goes_back_up_at_the_switch() -> None:
    phases = Phases(0.5)
    rates = [phases.rate(s) for s in range(phases.steps)]
    assert max(rates[:100]) == pytest.approx(1, abs=0.01) and rates[1499] == pytest.approx(0.1, abs=1e-3)
    assert rates[1500] == 1 and rates[-1] < 0.11


@pytest.mark.parametrize("wrong", [{"replay": 1.5}, {"replay": 0.5, "english": 0}, {"replay": 0.5, "python": -1}])
def test_wrong_phases_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Phases(**wrong)  # type: ignore[arg-type]


def test_the_story_is_made_of_what_was_measured() -> None:
    phases = Phases(0.0, **SHORT)
    monitor = stability_gap(phases)
    diagnostics = TrainingDiagnostics(monitors=[monitor], default_monitors=False, terminal=False, strict=True)
    outcome = train(phases, [diagnostics])
    assert outcome.losses == train(phases).losses
    story = Story.of(outcome, diagnostics.alerts, diagnostics.history, monitor.continual.gaps.get(TASK))
    told = dict(story.lines())
    assert story.found is not None and story.found[0] == 90 and "learning rate raised" in told["found"]
    assert told["switch"] == "at step 90, with 0% of English in each batch from there"
    assert f"{monitor.continual.gaps[TASK].baseline:.3f} nats per byte before" in told["English"]
    assert story.before_the_switch == ()
    assert len(story.row()) == len(HEADINGS)


def test_the_command_compares_both_and_says_how_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show_continual, "Phases", lambda replay, seed: Phases(replay, seed=seed, **SHORT))
    done = CliRunner().invoke(
        app, ["demo", "continual", "--log-dir", str(tmp_path / "a b")], env={"COLUMNS": "80"}, catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.output.split("Side by side")[1]
    for replay in ("50%", "0%"):
        assert f"What happened with {replay} of English kept" in done.output
    assert f"tensorboard --logdir '{tmp_path}/a b'" in done.output
    for name in ("continual-replay-0.5", "continual-replay-0"):
        assert list((tmp_path / "a b" / name / "version_0").glob("events.out.tfevents.*"))


def test_a_wrong_share_is_told_by_the_command() -> None:
    done = CliRunner().invoke(app, ["demo", "continual", "--replay", "2"])
    assert done.exit_code == 2 and "--replay" in done.output
