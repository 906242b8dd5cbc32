"""A run with the callback is the run without it, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lightning_runs.run import fit
from traindiag import TrainingDiagnostics

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "bf16_true": {"precision": "bf16-true"},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
    "dropout": {"dropout": 0.2},
    "dropout_clipped_accumulated_bf16": {
        "dropout": 0.2,
        "gradient_clip_val": 0.1,
        "accumulate_grad_batches": 2,
        "precision": "bf16-mixed",
    },
    "checkpoint_reentrant": {"checkpointing": "reentrant", "dropout": 0.2},
    "checkpoint": {"checkpointing": "non-reentrant", "dropout": 0.2},
    "manual": {"manual": True, "dropout": 0.2},
    "large_logits": {"qk_scale": 8.0},
}


@pytest.mark.parametrize("exact", [False, True], ids=["sampled", "exact"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral(variant: str, exact: bool) -> None:
    options = VARIANTS[variant]
    without = fit(**options)
    diagnostics = TrainingDiagnostics(every_n_steps=2, exact=exact, strict=True, terminal=False)
    with_it = fit([diagnostics], **options)
    assert without.equals(with_it)
    for signal in ("attention/max_logit", "output/log_z", "activation/rms"):
        assert diagnostics.history[signal].steps.tolist() == [0, 2, 4]  # it did look
    assert [str(c) for c in diagnostics.history["output/log_z"].cells] == ["next_token_loss"]


def test_the_comparison_can_fail() -> None:
    class Disturb(TrainingDiagnostics):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.rand(1)
            super().on_train_batch_start(*args)

    without = fit(dropout=0.2)
    assert not without.equals(fit([Disturb(terminal=False)], dropout=0.2))
