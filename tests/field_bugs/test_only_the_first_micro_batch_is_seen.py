"""Under gradient accumulation only the first micro-batch is measured, and the bad one is another."""

from __future__ import annotations

import pytest
import torch

from tests.field_bugs.loop import batch, gpt, loss_of
from traindiag.engine.diagnostics import Diagnostics


@pytest.mark.parametrize("hot", [0, 1, 2])
def test_the_largest_logit_of_any_micro_batch_and_the_mean_loss_of_all(hot: int) -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    diagnostics = Diagnostics(model, optimizer, exact=True, terminal=False)
    weight = model.blocks[1].attention.query_key_value.weight
    losses = []
    with diagnostics.step() as step:
        for i in range(3):
            with torch.no_grad():
                weight[:32] *= 30.0 if i == hot else 1.0
            loss = step.loss(loss_of(model, batch(i)))
            losses.append(loss.item())
            (loss / 3).backward()
            with torch.no_grad():
                weight[:32] /= 30.0 if i == hot else 1.0
        optimizer.step()
    diagnostics.finish()
    series = diagnostics.history["attention/max_logit"]
    of_the_hot_layer = [v for c, v in zip(series.cells, series.values[0]) if "blocks.1" in str(c.coordinates[0])]
    assert min(of_the_hot_layer) > 200 > 10 * max(series.values[0][:2])
    assert diagnostics.history["loss/value"].values[0, 0] == pytest.approx(sum(losses) / 3, rel=1e-6)
