"""A bias on the keys raises every logit of a row alike: softmax cancels it, its gradient is rounding error, and
limits on raw logits or on gradients against epsilon warn of it for as long as the run lasts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field_bugs.loop import gpt, train
from tests.field_bugs.pack import warnings


class KeyBias(nn.Module):
    """Causal attention with layers of its own for queries, keys and values; the keys' bias is large."""

    def __init__(self, width: int, heads: int, size: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=bias) for bias in (False, True, False))
        with torch.no_grad():
            self.key.bias.mul_(size / self.key.bias.norm())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_it_is_left_alone() -> None:
    model = gpt()
    for block in model.blocks:
        block.attention = KeyBias(16, 2, size=5e3)
    diagnostics = train(model, steps=40)
    history = diagnostics.history
    assert history["attention/max_logit"].values.max() > 1e3 > 20 > history["attention/logit_range"].values.max()
    against = history["optimizer/grad_rms_over_eps"]
    (bias, *_) = [i for i, c in enumerate(against.cells) if str(c.coordinates[-1]).endswith("key.bias")]
    matrices = [i for i, c in enumerate(against.cells) if str(c.coordinates[-1]).endswith("value.weight")]
    assert against.values[:, bias].max() < against.values[:, matrices].min() / 1e2
    assert warnings(diagnostics.alerts) == []
