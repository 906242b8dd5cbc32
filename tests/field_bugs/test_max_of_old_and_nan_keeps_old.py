"""``max(old, nan)`` keeps ``old``: a NaN in one micro-batch hides behind the finite maximum of another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.field_bugs.loop import gpt, train


class Spoils(nn.Module):
    """Puts a NaN into the queries of one call, counted over micro-batches."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.call, self.calls = inner, call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.clone()
        if self.calls - 1 == self.call:
            x[-1, -1] = torch.nan
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_nan_wins_in_whichever_micro_batch_it_comes(micro_batch: int) -> None:
    model = gpt()
    model.blocks[0].attention = Spoils(model.blocks[0].attention, micro_batch)
    diagnostics = train(model, steps=1, micro_batches=3, size=6)
    series = diagnostics.history["attention/max_logit"]
    layers = [str(c.coordinates[0]) for c in series.cells]
    first = [i for i, layer in enumerate(layers) if layer.startswith("blocks.0")]
    assert len(first) == 2 and series.seen[0, first].all()
    assert torch.tensor(series.values[0, first]).isnan().all()
