"""LoRA's B begins at zero, so its first updates are as large as itself, and A's gradient at the first step is exactly
zero: limits on updates and gradients warn of every healthy fine-tuning.
"""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.field_bugs.loop import gpt, train
from tests.field_bugs.pack import told, warnings
from tests.rules.frames import frame, reading


class Adapted(nn.Module):
    """A frozen layer and B A beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.b(self.a(x))
        return out


@pytest.mark.parametrize("every", [1, 3, 10])
def test_they_are_left_alone(every: int) -> None:
    model = gpt(width=32).requires_grad_(False)
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Adapted(layer))
    diagnostics = train(model, steps=40, every_n_steps=every)
    ratio = diagnostics.history["optimizer/update_ratio"]
    b = [str(c.coordinates[-1]).endswith("b.weight") for c in ratio.cells]
    assert sum(b) >= len(b) / 2 and not ratio.seen[0, b].any()
    if every == 1:
        assert (ratio.values[1:4, b] > 0.1).all()  # what a plain limit would tell
    assert warnings(diagnostics.alerts) == []


def test_updates_that_are_too_large_from_the_first_are_told() -> None:
    frames = [frame(i, reading([0.3 / (i + 1) + 0.2, 0.5], "optimizer/update_ratio")) for i in range(5)]
    assert [(step, rule) for step, rule, _ in warnings(told(frames))] == [(2, "optimizer/update-ratio")]
