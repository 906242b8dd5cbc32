"""A callback that takes ``outputs`` for a tensor dies on a step that returns nothing or a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from traindiag import TrainingDiagnostics

STEPS = 6


class Returns(Automatic):
    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        super().__init__(DropoutGPT(), Trace())
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.kind == "none at times":
            return None if batch_idx % 3 == 1 else loss
        return {"loss": loss, "extra": torch.ones(3), "name": "a string"}


@pytest.mark.parametrize("kind", ["none at times", "dict"])
def test_the_run_ends_and_what_there_was_is_recorded(kind: str) -> None:
    module = Returns(kind)
    diagnostics = TrainingDiagnostics(every_n_steps=2, strict=True, terminal=False)
    trace = fit([diagnostics], module=module, trace=module.trace, steps=STEPS, max_epochs=1, max_steps=-1)
    kept = [x for i, x in enumerate(trace.losses) if kind == "dict" or i % 3 != 1]
    loss = diagnostics.history["loss/value"]
    np.testing.assert_allclose(loss.values[loss.seen], torch.stack(kept), rtol=1e-6)
    assert len(diagnostics.history["gradient/norm"]) == len(kept)


def test_a_step_that_never_returns_a_loss() -> None:
    class Never(Returns):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            return None

    module = Never("")
    diagnostics = TrainingDiagnostics(strict=True, terminal=False)
    fit([diagnostics], module=module, steps=STEPS, max_epochs=1, max_steps=-1, validation=False)
    assert "gradient/norm" not in diagnostics.history
    assert any(c.family == "gradient" and c.sight == "unseen" for c in diagnostics.coverage)
