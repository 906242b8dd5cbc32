"""Gradients are those before clipping, and the loss is the one that the Trainer logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hf_runs.run import Text, Traced, gpt2, llama, train
from traindiag import HFTrainingDiagnostics


class Oracle(Traced):
    """Loss and gradient norm of each step in float64, from a copy of the model and plain autograd: no Trainer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Tensor]] = []
        self.expected: list[tuple[float, float]] = []

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.batches.append(inputs)
        if self.accelerator.sync_gradients:
            tokens, labels = (torch.cat([b[k] for b in self.batches]) for k in ("input_ids", "labels"))
            twin = copy.deepcopy(self.accelerator.unwrap_model(model)).double()
            twin.zero_grad()
            logits = twin(input_ids=tokens).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            self.expected.append((float(loss), float(torch.cat([g.flatten() for g in gradients]).norm())))
            self.batches.clear()
        return super().training_step(model, inputs, *args, **kwargs)


def measured(diagnostics: HFTrainingDiagnostics, signal: str) -> Any:
    return diagnostics.history[signal].values[:, 0]


CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {}),
        (llama, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.01}),
        (llama, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "data": Text(100, ragged=True)}),
        (gpt2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01, **CHECKPOINTING}),
        # 7 batches an epoch: the last step of each has a single micro-batch
        (llama, {"gradient_accumulation_steps": 2, "data": Text(28, ragged=True), "max_grad_norm": 0.01}),
    ],
    ids=["plain", "clipped", "ragged", "checkpoint", "odd"],
)
def test_against_a_model_trained_by_nobody(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    kept: list[Oracle] = []

    class Kept(Oracle):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    diagnostics = HFTrainingDiagnostics(terminal=False, strict=True)
    trace = train(make(), [diagnostics], tmp_path, kind=Kept, **options)
    losses, norms = np.array(kept[0].expected).T
    np.testing.assert_allclose(measured(diagnostics, "gradient/norm"), norms, rtol=1e-4)
    np.testing.assert_allclose(measured(diagnostics, "loss/value"), losses, rtol=1e-5)
    np.testing.assert_allclose(measured(diagnostics, "loss/value"), trace.logged("loss"), rtol=1e-5)
    assert len(norms) == 6 and norms.min() > 0.1  # far above the clip value: it is the norm before
    applied = diagnostics.history["gradient/norm_applied"]
    assert applied.steps.tolist() == [0]
    if options.get("max_grad_norm") == 0.0:
        np.testing.assert_allclose(applied.values[:, 0], norms[0], rtol=1e-4)


def test_in_half_precision_it_is_the_norm_that_the_trainer_reports(tmp_path: Path) -> None:
    diagnostics = HFTrainingDiagnostics(terminal=False, strict=True)
    trace = train(llama(), [diagnostics], tmp_path, bf16=True, max_grad_norm=0.01, gradient_accumulation_steps=2)
    np.testing.assert_allclose(measured(diagnostics, "gradient/norm"), trace.logged("grad_norm"), rtol=1e-5)


def test_the_loss_scale_is_removed(tmp_path: Path) -> None:
    class Scaled(Traced):
        """As on a GPU with ``fp16=True``; accelerate refuses that on a CPU."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"

    diagnostics = HFTrainingDiagnostics(terminal=False, strict=True)
    trace = train(llama(), [diagnostics], tmp_path, kind=Scaled, max_grad_norm=0.01)
    np.testing.assert_allclose(measured(diagnostics, "gradient/norm"), trace.logged("grad_norm"), rtol=1e-5)
    np.testing.assert_allclose(measured(diagnostics, "loss/value"), trace.logged("loss"), rtol=1e-5)
    assert diagnostics._diagnostics is not None and diagnostics._diagnostics.run.precision == "16-mixed"
    unscaled = HFTrainingDiagnostics(terminal=False)
    train(llama(), [unscaled], tmp_path)
    first = [measured(d, "gradient/norm")[0] for d in (diagnostics, unscaled)]
    np.testing.assert_allclose(*first, rtol=0.05)  # half precision against float32


@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({}, False),
        ({"bf16": True}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"max_grad_norm": 1e9}, False),
        ({}, True),
        ({"max_grad_norm": 0.0}, True),  # nobody removes the loss scale before the optimizer does
    ],
)
def test_what_clipping_leaves(options: dict[str, Any], scaled: bool, tmp_path: Path) -> None:
    given: list[float] = []

    class Watched(Traced):
        """Writes down the norm of what the optimizer is given, in float64."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if scaled:
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
                self.accelerator.native_amp = True
                self.accelerator.state._mixed_precision = "fp16"

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = super().create_optimizer(*args, **kwargs)

            def note(optimizer: Any, *_: Any) -> None:
                gradients = [p.grad.double().flatten() for g in optimizer.param_groups for p in g["params"]]
                scale = getattr(optimizer, "grad_scale", None)
                given.append(float(torch.cat(gradients).norm() / (1 if scale is None else scale)))

            made.register_step_pre_hook(note)
            return made

    diagnostics = HFTrainingDiagnostics(every_n_steps=2, max_overhead=None, terminal=False, strict=True)
    options = {"max_grad_norm": 0.01, **options}
    train(llama(), [diagnostics], tmp_path, kind=Watched, **options)
    applied = diagnostics.history["gradient/norm_applied"]
    assert applied.steps.tolist() == [0, 2, 4] and len(given) == 6
    np.testing.assert_allclose(applied.values[:, 0], given[::2], rtol=1e-5)
    before = measured(diagnostics, "gradient/norm")[::2]
    expected = np.full(3, 0.01) if options["max_grad_norm"] == 0.01 else before
    np.testing.assert_allclose(applied.values[:, 0], expected, rtol=1e-3)
    assert before.min() > 0.1
