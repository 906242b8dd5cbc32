"""An activation monitor raises in the user's forward pass when a module returns a dict."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from traindiag.engine.diagnostics import Diagnostics


class Block(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.linear(x if isinstance(x, Tensor) else x["hidden"])
        return self.kind({"loss": hidden.sum(), "hidden": hidden})


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_dict_is_looked_into(kind: type) -> None:
    model = nn.Sequential(Block(kind), Block(kind))
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.0), terminal=False, strict=True)
    x = torch.randn(2, 3, 4)
    with diagnostics.step() as step:
        step.loss(model(x)["loss"]).backward()
    diagnostics.finish()
    rms = diagnostics.history["activation/rms"]
    assert rms.cells.labels == ("0", "1")
    torch.testing.assert_close(float(rms.values[0, 0]), model[0](x)["hidden"].square().mean().sqrt().item())
