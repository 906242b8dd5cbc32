"""A NaN or a tenfold gradient norm, injected at any step, is told within two steps at the default cadence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.lightning_runs.run import fit
from traindiag import TrainingDiagnostics

STEPS = 45


class Inject(Callback):
    """Changes one gradient at one step; placed before the diagnostics, as if backward had made it so."""

    def __init__(self, step: int, kind: str) -> None:
        self.step, self.kind = step, kind

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step != self.step:
            return
        for name, parameter in pl_module.named_parameters():
            if self.kind == "tenfold":
                parameter.grad.mul_(10)
            elif name == "model.net.blocks.1.mlp.0.weight" or name.endswith("head.weight"):
                parameter.grad.view(-1)[3] = torch.nan


class Told(Callback):
    """The step during which an alert was first there."""

    def __init__(self, diagnostics: TrainingDiagnostics, rule: str) -> None:
        self.diagnostics, self.rule = diagnostics, rule
        self.at: int | None = None

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.at is None and any(a.rule == self.rule for a in self.diagnostics.alerts):
            self.at = trainer.global_step - 1


@pytest.mark.parametrize("step", [0, 1, 9, 10, 17, 43])
def test_nan_is_told_with_the_first_tensor(step: int) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    told = Told(diagnostics, "nonfinite")
    fit([Inject(step, "nan"), diagnostics, told], steps=STEPS)
    alert = next(a for a in diagnostics.alerts if a.rule == "nonfinite")
    assert alert.step == step and alert.severity == "critical"
    assert "model.net.blocks.1.mlp.0.weight" in alert.where + alert.evidence
    assert told.at is not None and told.at <= step + 2
    assert sum(a.rule == "nonfinite" and a.status == "opened" for a in diagnostics.alerts) == 1


@pytest.mark.parametrize("step", [5, 9, 10, 17, 43])
def test_tenfold_gradient_is_told(step: int) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    told = Told(diagnostics, "gradient/norm-spike")
    fit([Inject(step, "tenfold"), diagnostics, told], steps=STEPS)
    assert told.at is not None and step < told.at <= step + 2


def test_nan_in_the_last_step_is_told_at_exit() -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([Inject(STEPS - 1, "nan"), diagnostics], steps=STEPS)
    assert any(a.rule == "nonfinite" and a.step == STEPS - 1 for a in diagnostics.alerts)


def test_nan_loss_before_an_exception_is_told() -> None:
    class Raise(Callback):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                raise FloatingPointError("loss is NaN")

    diagnostics = TrainingDiagnostics(terminal=False)
    with pytest.raises(FloatingPointError):
        fit([Inject(3, "nan"), diagnostics, Raise()], steps=6)
    assert any(a.rule == "nonfinite" and a.step == 3 for a in diagnostics.alerts)


def test_quiet_without_a_fault() -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([diagnostics], steps=STEPS)
    assert [a.title for a in diagnostics.alerts if a.severity != "info"] == []
