"""Whatever breaks in the engine or the callback, Lightning's run is the run without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from traindiag import TrainingDiagnostics
from traindiag.adapters import lightning as adapter
from traindiag.capture.window import Capture
from traindiag.engine.judge import Judge
from traindiag.transfer.lane import Lane

STEPS = 8


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Capture, "open"),
        (Capture, "_enter"),
        (Lane, "send"),
        (Judge, "hear"),
        (Judge, "state_dict"),
        (adapter, "batch_size"),
        (adapter, "_loss_scale"),
        (TrainingDiagnostics, "_hand_over_losses"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_the_run_is_the_run_without_us(
    owner: Any, name: str, manual: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = fit(steps=STEPS, manual=manual)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("injected")

    told: list[str] = []
    monkeypatch.setattr("traindiag.engine.outlet.Outlet.say", lambda self, text: told.append(text))
    monkeypatch.setattr(owner, name, broken)
    trace = Trace()
    torch.manual_seed(0)
    diagnostics = TrainingDiagnostics(every_n_steps=2, max_overhead=None, terminal=False)
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1)
    with_it = fit([diagnostics, save], steps=STEPS, manual=manual, trace=trace, enable_checkpointing=True)
    assert without.equals(with_it)
    if name == "_loss_scale" and not manual:
        return  # asked for fused optimizers only
    assert len(told) == 1 and "ZeroDivisionError: injected" in told[0]
    checkpoint = next(tmp_path.glob("*.ckpt"))
    monkeypatch.undo()
    again = TrainingDiagnostics(terminal=False)  # a job that resumes from it goes on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([again], steps=STEPS, manual=manual, ckpt_path=str(checkpoint))
    assert again.history["loss/value"].seen.any()


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(Lane, "send", broken)
    module = Automatic(DropoutGPT(), Trace())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([TrainingDiagnostics(every_n_steps=1, terminal=False)], module=module)
    assert leftovers(module, None) == NOTHING
