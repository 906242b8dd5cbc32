"""StabilityGap under Lightning: no trace of it, and a loader that is swapped."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit, loader
from traindiag import StabilityGap, TrainingDiagnostics


def english(module: Any, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    logits = module.model(inputs)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, targets.numel()


def watching(**settings: Any) -> tuple[StabilityGap, TrainingDiagnostics]:
    gap = StabilityGap({"text": loader(3, seed=5)}, english, higher_is_better=False, **settings)
    return gap, TrainingDiagnostics(monitors=[gap], every_n_steps=3, strict=True, terminal=False)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2, "precision": "bf16-mixed", "accumulate_grad_batches": 2},
        {"dropout": 0.2, "manual": True},
    ],
    ids=["automatic", "manual"],
)
def test_the_run_is_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    gap, diagnostics = watching(every=2, gradients=True)
    gap.mark_shift("from the first step on")
    assert fit(**options).equals(fit([diagnostics], **options))
    assert diagnostics.history["stability/loss"].steps.tolist() == list(range(6))
    assert diagnostics.history["stability/gradient_cosine"].steps.tolist() == [0, 2, 5]


def test_it_computes_in_the_precision_of_the_run() -> None:
    seen = set()

    def metric(module: Any, batch: Any) -> tuple[Tensor, int]:
        seen.add(module.model(batch[0]).dtype)
        return english(module, batch)

    gap = StabilityGap({"text": loader(1, seed=5)}, metric, higher_is_better=False)
    fit([TrainingDiagnostics(monitors=[gap], strict=True, terminal=False)], precision="bf16-mixed", steps=2)
    assert seen == {torch.bfloat16}


class Swaps(Automatic):
    """Goes over to another data set with its third epoch; the second one has another loader of the same."""

    def __init__(self) -> None:
        super().__init__(DropoutGPT(), Trace())
        self.sets = [loader(4).dataset, loader(4, seed=9).dataset]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets[self.trainer.current_epoch // 2], batch_size=4)


def test_a_loader_over_another_data_set_is_a_shift() -> None:
    _, diagnostics = watching(every=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            max_epochs=4,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[diagnostics],
        ).fit(Swaps())
    shifts = diagnostics.history["stability/shift"]
    assert (shifts.steps.tolist(), shifts.cells.labels) == ([8], ("data changed",))
    assert diagnostics.history["stability/loss"].steps.tolist() == [0, *range(9, 16)]
