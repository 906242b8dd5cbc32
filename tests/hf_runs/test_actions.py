"""Hugging Face's Trainer does what an alert asks for: it stops, saves a checkpoint, or ends with an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hf_runs.run import build, llama, train, transformers
from tests.hf_runs.test_cleanup import NOTHING, is_as_before, look
from tests.ranks import run_on_ranks
from traindiag import HFTrainingDiagnostics, Raise, SaveCheckpoint, StopTraining, Threshold, TrainingAlert
from traindiag.alerts.jsonl import read_alerts


class Numbers(transformers.TrainerCallback):  # type: ignore[misc]
    """Logs a number that passes its limit in the fourth step."""

    def __init__(self, diagnostics: HFTrainingDiagnostics) -> None:
        self.diagnostics = diagnostics

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.diagnostics.log("user/number", 0.0 if state.global_step < 3 else 2.0)


def watching(*actions: Any) -> list[Any]:
    rule = Threshold("user/number", above=1.0, name="number")
    diagnostics = HFTrainingDiagnostics(
        rules=[rule], every_n_steps=2, max_overhead=None, terminal=False, actions=actions
    )
    return [diagnostics, Numbers(diagnostics)]


def test_stops(tmp_path: Path) -> None:
    trainer = build(llama(), watching(StopTraining()), tmp_path, steps=20)
    with pytest.warns(RuntimeWarning, match="training stops after step 4"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert look(trainer) == NOTHING and is_as_before(trainer)


def test_saves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    without = train(llama(), [], tmp_path / "without", steps=10)
    callbacks = watching(SaveCheckpoint())
    trace = train(llama(), callbacks, tmp_path / "run", steps=10, save_strategy="steps", save_steps=100)
    assert all(a.equal(b) for a, b in zip(trace.parameters, without.parameters))
    saved = tmp_path / "run" / "checkpoint-5"
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} <= {"checkpoint-5", "checkpoint-10"}
    assert (saved / "traindiag.pt").exists()
    again = watching(SaveCheckpoint(), StopTraining())
    resumed = train(llama(), again, tmp_path / "again", steps=10, resume=str(saved))
    assert all(a.equal(b) for a, b in zip(resumed.parameters, without.parameters))
    assert [a.id for a in again[0].alerts] == [a.id for a in callbacks[0].alerts]
    assert not list((tmp_path / "again").glob("checkpoint-*"))


@pytest.mark.parametrize("save", [False, True], ids=["raise", "save and raise"])
def test_raises_and_leaves_nothing(save: bool, tmp_path: Path) -> None:
    callbacks = watching(Raise(), *([SaveCheckpoint()] if save else []))
    trainer = build(llama(), callbacks, tmp_path, steps=20)
    with pytest.raises(TrainingAlert) as error:
        trainer.train()
    assert (error.value.alert.rule, trainer.state.global_step) == ("number", 5)
    assert look(trainer) == NOTHING and is_as_before(trainer)
    (file,) = tmp_path.rglob("alerts.jsonl")
    assert [a.id for a in read_alerts(file)] == [a.id for a in callbacks[0].alerts]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-5"] if save else [])
    assert bool(list(tmp_path.rglob("traindiag.pt"))) is save


def _ranks(rank: int, folder: str) -> dict[str, Any]:
    import warnings

    callbacks = watching(StopTraining(), SaveCheckpoint())
    trainer = build(llama(), callbacks, Path(folder), steps=20, ddp_backend="gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return {"ended": trainer.state.global_step, "alerts": [a.id for a in callbacks[0].alerts]}


def test_two_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    one, other = run_on_ranks(_ranks, str(tmp_path))
    assert one == other and one["alerts"] and one["ended"] == 6
    assert (tmp_path / "checkpoint-6" / "traindiag.pt").exists()
