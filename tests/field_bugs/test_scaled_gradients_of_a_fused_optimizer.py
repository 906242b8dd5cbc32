"""Under a GradScaler a fused optimizer removes the loss scale itself: until then gradients are 2^16 too large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.field_bugs.loop import batch, gpt, loss_of
from traindiag.engine.diagnostics import Diagnostics

SCALE = 2.0**16


@pytest.mark.parametrize("attach", [False, True], ids=["step", "attach"])
@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_applied_norm_is_that_of_unscaled_gradients(fused: bool, unscaled_first: bool, attach: bool) -> None:
    model = gpt(layers=1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    diagnostics = (Diagnostics.attach if attach else Diagnostics)(model, optimizer, terminal=False)
    truth = []

    def one(i: int) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(i))).backward()
        truth.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm() / SCALE)
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    for i in range(4):
        if attach:
            one(i)
        else:
            with diagnostics.step():
                one(i)
    diagnostics.finish()
    found = diagnostics.history["gradient/norm_applied"].values[:, 0]
    np.testing.assert_allclose(found, truth, rtol=1e-5)
