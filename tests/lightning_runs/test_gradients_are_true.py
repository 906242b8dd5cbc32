"""Gradients are measured where they are true: accumulated, unscaled, before clipping, once a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from tests.lightning_runs.run import fit
from traindiag import TrainingDiagnostics


class Oracle(Callback):
    """The norm and the mean loss of each step, in float64, from gradients recomputed by hand."""

    def __init__(self, scale: bool = False) -> None:
        self.norms: list[float] = []
        self.scale = scale

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.double() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        self.norms.append(norm / trainer.precision_plugin.scaler.get_scale() if self.scale else norm)


def norms(diagnostics: TrainingDiagnostics) -> list[float]:
    return diagnostics.history["gradient/norm"].values[:, 0].tolist()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_before_clipping_and_once_a_step(accumulate: int) -> None:
    diagnostics, oracle = TrainingDiagnostics(terminal=False), Oracle()
    trace = fit([diagnostics, oracle], accumulate_grad_batches=accumulate, gradient_clip_val=0.01, steps=5)
    np.testing.assert_allclose(norms(diagnostics), oracle.norms, rtol=1e-5)
    assert len(oracle.norms) == 5 and min(oracle.norms) > 0.1  # far above the clip value: it is the norm before
    losses = torch.stack(trace.losses).double().view(5, accumulate).mean(1)
    np.testing.assert_allclose(diagnostics.history["loss/value"].values[:, 0], losses, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_is_removed(fused: bool) -> None:
    from tests.lightning_runs.run import Automatic, DropoutGPT, Trace

    class Scaled(Automatic):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=fused)

    def run(scaled: bool) -> tuple[TrainingDiagnostics, Oracle]:
        torch.manual_seed(0)
        diagnostics, oracle = TrainingDiagnostics(terminal=False), Oracle(scale=scaled and fused)
        plugins = (
            [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))] if scaled else None
        )
        trace = Trace()
        module = Scaled(DropoutGPT(), trace)
        fit([diagnostics, oracle], module=module, trace=trace, plugins=plugins, steps=4)
        return diagnostics, oracle

    diagnostics, oracle = run(scaled=True)
    np.testing.assert_allclose(norms(diagnostics), oracle.norms, rtol=1e-4)
    unscaled, _ = run(scaled=False)
    np.testing.assert_allclose(norms(diagnostics), norms(unscaled), rtol=0.05)  # half precision against float32


def test_manual_optimization_keeps_optimizers_apart() -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    trace = fit([diagnostics], manual=True, steps=4)
    norm, loss = diagnostics.history["gradient/norm"], diagnostics.history["loss/value"]
    assert norm.steps.tolist() == [0, 1, 2, 3]
    assert [c.coordinates[0] for c in norm.cells] == ["AdamW", "SGD"]
    first, second = torch.stack(trace.losses).double().view(4, 2).T
    # both losses of a batch were followed by a step of the head, the second one before that of the body
    np.testing.assert_allclose(loss.values[:, 0], (first + second) / 2, rtol=1e-5)


def test_raw_optimizers_in_manual_optimization_are_seen() -> None:
    from tests.lightning_runs.run import DropoutGPT, Manual, Trace

    class Raw(Manual):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    trace = Trace()
    diagnostics = TrainingDiagnostics(terminal=False)
    torch.manual_seed(0)
    fit([diagnostics], module=Raw(DropoutGPT(), trace), trace=trace, steps=3, max_steps=-1, max_epochs=1)
    assert diagnostics.history["gradient/norm_applied"].steps.tolist() == [0, 1, 2]


class Recording(torch.optim.SGD):
    """Writes down the norm of what it is given, in float64; over many tensors at once Nesterov's writes over it."""

    given: list[float]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.given.append(
            float(torch.cat([p.grad.double().flatten() for p in self.param_groups[0]["params"]]).norm())
        )
        super().step()
        return loss


def recorded(optimizer: list[Recording], base: Any = None) -> Any:
    from tests.lightning_runs.run import Automatic

    class Recorded(base or Automatic):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            made = Recording(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, foreach=True)
            made.given = []
            optimizer.append(made)
            return made

    return Recorded


CLIPPED: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.01},
    "value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "accumulated": {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2},
    "bf16": {"gradient_clip_val": 0.01, "precision": "bf16-mixed"},
    "scaled": {"gradient_clip_val": 0.01},
    "not": {},
}


@pytest.mark.parametrize("kind", CLIPPED)
def test_what_clipping_leaves_is_there_at_samples(kind: str) -> None:
    from tests.lightning_runs.run import DropoutGPT, Trace

    optimizer: list[Recording] = []
    trace, oracle = Trace(), Oracle()
    torch.manual_seed(0)
    module = recorded(optimizer)(DropoutGPT(), trace)
    options = dict(CLIPPED[kind])
    if kind == "scaled":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    diagnostics = TrainingDiagnostics(every_n_steps=2, max_overhead=None, terminal=False, strict=True)
    fit([diagnostics, oracle], module=module, trace=trace, steps=5, **options)
    applied = diagnostics.history["gradient/norm_applied"]
    assert applied.steps.tolist() == [0, 2, 4] and len(norms(diagnostics)) == 5
    np.testing.assert_allclose(applied.values[:, 0], optimizer[0].given[::2], rtol=1e-5)
    np.testing.assert_allclose(norms(diagnostics), oracle.norms, rtol=1e-5)
    ratio = applied.values[:, 0] / norms(diagnostics)[::2]
    assert np.allclose(ratio, 1) if kind == "not" else (ratio < 0.5).all()


def test_what_manual_clipping_leaves() -> None:
    from tests.lightning_runs.run import Automatic, DropoutGPT, Trace

    class Clips(Automatic):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            self.clip_gradients(optimizer, 0.01, "norm")
            optimizer.step()

    optimizer: list[Recording] = []
    trace = Trace()
    torch.manual_seed(0)
    module = recorded(optimizer, Clips)(DropoutGPT(), trace)
    diagnostics = TrainingDiagnostics(every_n_steps=1, max_overhead=None, terminal=False, strict=True)
    fit([diagnostics], module=module, trace=trace, steps=3)
    applied = diagnostics.history["gradient/norm_applied"]
    np.testing.assert_allclose(applied.values[:, 0], optimizer[0].given, rtol=1e-5)
    np.testing.assert_allclose(applied.values[:, 0], 0.01, rtol=1e-3)
