"""An activation monitor takes a module's output for a sequence of outputs and walks along the batch of a tensor."""

from __future__ import annotations

import torch
from torch import nn

from traindiag.engine.diagnostics import Diagnostics


def test_a_plain_tensor_is_one_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.0), terminal=False, strict=True)
    x = torch.randn(64, 4)
    with diagnostics.step() as step:
        step.loss(model(x).mean()).backward()
    diagnostics.finish()
    rms = diagnostics.history["activation/rms"]
    assert rms.cells.labels == ("0", "2")  # two layers, not 64 items each
    torch.testing.assert_close(float(rms.values[0, 0]), model[0](x).square().mean().sqrt().item())
