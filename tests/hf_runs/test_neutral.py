"""A run with the callback is the run without it, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_runs.run import gpt2, llama, train
from traindiag import HFTrainingDiagnostics


def use_reentrant(value: bool) -> dict[str, Any]:
    return {"gradient_checkpointing_kwargs": {"use_reentrant": value}}


VARIANTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "plain": (llama, {}, {}),
    "accumulated": (llama, {}, {"gradient_accumulation_steps": 2}),
    "clipped": (llama, {}, {"max_grad_norm": 0.1}),
    "unclipped": (llama, {}, {"max_grad_norm": 0.0}),
    "checkpoint": (llama, {}, {"gradient_checkpointing": True, **use_reentrant(False)}),
    "checkpoint_reentrant": (gpt2, {"dropout": 0.2}, {"gradient_checkpointing": True, **use_reentrant(True)}),
    "everything": (
        gpt2,
        {"dropout": 0.2},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "gradient_checkpointing": True},
    ),
    "bf16": (gpt2, {"dropout": 0.2}, {"bf16": True}),
    "evaluated": (gpt2, {"dropout": 0.2}, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}),
    "large_logits": (llama, {"qk_scale": 20.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral(variant: str, tmp_path: Path) -> None:
    make, model, options = VARIANTS[variant]
    without = train(make(**model), [], tmp_path, **options)
    diagnostics = HFTrainingDiagnostics(every_n_steps=2, max_overhead=None, strict=True, terminal=False)
    with_it = train(make(**model), [diagnostics], tmp_path, **options)
    assert without.equals(with_it)
    assert {0, 2, 4} <= set(diagnostics.history["attention/max_logit"].steps.tolist())  # it did look


def test_compiled_is_neutral_and_seen(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    torch._dynamo.reset()
    without = train(llama(), [], tmp_path, steps=3, **options)
    torch._dynamo.reset()
    diagnostics = HFTrainingDiagnostics(every_n_steps=1, strict=True, terminal=False)
    with_it = train(llama(), [diagnostics], tmp_path, steps=3, **options)
    torch._dynamo.reset()
    assert without.equals(with_it)
    assert len(diagnostics.history["gradient/norm"]) == 3
    (attention,) = (row for row in diagnostics.coverage if row.family == "attention")
    assert attention.sight == "bound" and "compiled" in attention.reason
    assert len(diagnostics.history["attention/max_logit"]) == 3


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    class Disturb(HFTrainingDiagnostics):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)
            super().on_step_begin(*args, **kwargs)

    without = train(gpt2(dropout=0.2), [], tmp_path)
    assert not without.equals(train(gpt2(dropout=0.2), [Disturb(terminal=False)], tmp_path))
