"""Lightning does what an alert asks for: it stops, saves a checkpoint that it can load, or ends with an exception."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from tests.ranks import run_on_ranks
from traindiag import Raise, SaveCheckpoint, StopTraining, Threshold, TrainingAlert, TrainingDiagnostics
from traindiag.alerts.jsonl import read_alerts


class Steps(Callback):
    """Counts batches, and logs a number that passes its limit in the fourth."""

    def __init__(self) -> None:
        self.ended = 0
        self.optimizer: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.optimizer = trainer.optimizers[0]
        diagnostics = next(c for c in trainer.callbacks if isinstance(c, TrainingDiagnostics))
        # not diagnostics.log: Lightning puts the module's own in its place
        diagnostics._diagnostics.log("user/number", 0.0 if trainer.global_step < 3 else 2.0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended += 1


def watching(*actions: Any) -> TrainingDiagnostics:
    rule = Threshold("user/number", above=1.0, name="number")
    return TrainingDiagnostics(rules=[rule], every_n_steps=2, max_overhead=None, terminal=False, actions=actions)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_stops(manual: bool, tmp_path: Path) -> None:
    # under manual optimization the third update of a batch ends it, so that the second batch is past the limit
    steps = Steps()
    diagnostics = watching(StopTraining())
    fit([diagnostics, steps], steps=20, manual=manual, folder=tmp_path)
    (alert, *_) = (a for a in diagnostics.alerts if a.rule == "number")
    assert alert.step == (1 if manual else 3)
    assert steps.ended == alert.step + 2 < 20  # judged at the end of the step after it


@pytest.mark.parametrize("logger", [None, TensorBoardLogger, CSVLogger])
def test_saves_a_checkpoint_beside_the_log_that_goes_on(logger: Any, tmp_path: Path) -> None:
    logs = False if logger is None else logger(tmp_path / "logs", name="a", version="b")
    diagnostics = watching(SaveCheckpoint())
    theirs = ModelCheckpoint(dirpath=tmp_path / "theirs", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    without = fit([theirs], steps=10, enable_checkpointing=True)
    trace = fit([diagnostics, Steps()], steps=10, folder=tmp_path, logger=logs)
    assert trace.equals(without)
    folder = tmp_path if logger is None else tmp_path / "logs" / "a" / "b"
    (saved,) = (path for path in tmp_path.rglob("*.ckpt") if "theirs" not in path.parts)
    assert saved == folder / "traindiag" / "checkpoints" / "step-4-number-opened.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 5
    again, resumed = watching(SaveCheckpoint(), StopTraining()), Trace()
    fit([again, Steps()], steps=10, folder=tmp_path / "again", ckpt_path=str(saved), trace=resumed)
    assert resumed.equals(fit(steps=10, ckpt_path=str(tmp_path / "theirs" / "step=5.ckpt")))
    assert [a.id for a in again.alerts] == [a.id for a in diagnostics.alerts]  # told already: neither stops nor saves
    assert not list((tmp_path / "again").rglob("*.ckpt"))


def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rule = Threshold("loss/value", above=0.1)
    diagnostics = TrainingDiagnostics(rules=[rule], terminal=False, actions=[SaveCheckpoint()])
    fit([diagnostics], steps=6, fast_dev_run=4)
    assert diagnostics.alerts and not list(tmp_path.rglob("*"))


def test_raises_and_leaves_nothing(tmp_path: Path) -> None:
    module, steps = Automatic(DropoutGPT(), Trace()), Steps()
    diagnostics = watching(Raise(), SaveCheckpoint())
    with pytest.raises(TrainingAlert) as error:
        fit([diagnostics, steps], steps=20, module=module, logger=TensorBoardLogger(tmp_path), folder=tmp_path)
    assert (error.value.alert.rule, steps.ended) == ("number", 4)
    assert leftovers(module, steps.optimizer) == NOTHING
    (file,) = tmp_path.rglob("alerts.jsonl")
    assert [a.id for a in read_alerts(file)] == [a.id for a in diagnostics.alerts]
    assert list(tmp_path.rglob("*.ckpt"))  # the checkpoint came first


def _ranks(rank: int, folder: str, action: str) -> dict[str, Any]:
    steps = Steps()
    ends = Raise() if action == "raise" else StopTraining()
    diagnostics = watching(SaveCheckpoint(), ends)
    raised = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit([diagnostics, steps], steps=20, folder=Path(folder), strategy="ddp", devices=2)
        except TrainingAlert:
            raised = True
    return {"ended": steps.ended, "raised": raised, "alerts": [a.id for a in diagnostics.alerts]}


@pytest.mark.parametrize("action", ["stop", "raise"])
def test_two_ranks_end_after_the_same_step(action: str, tmp_path: Path) -> None:
    one, other = run_on_ranks(_ranks, str(tmp_path), action)
    assert one == other
    assert one["alerts"] and one["raised"] == (action == "raise")
    assert one["ended"] == (6 if action == "stop" else 5)
    (saved,) = tmp_path.rglob("*.ckpt")
    assert saved.name == "step-5-number-opened.ckpt"
    fit([watching(), Steps()], steps=10, ckpt_path=str(saved), folder=tmp_path)
