"""A running maximum is initialised with 0, so that a layer whose logits are all negative reads 0."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.engine.diagnostics import Diagnostics


class AllNegative(nn.Module):
    """Keys are the queries mirrored: every logit is below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).abs() + 1.0
        return F.scaled_dot_product_attention(q, -q, x)


def test_a_negative_maximum_stays_negative() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AllNegative(), nn.Linear(8, 1))
    x = torch.randn(2, 3, 10, 8)
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), exact=True, terminal=False)
    with diagnostics.step():
        model(x).sum().backward()
        model(2 * x).sum().backward()  # a second micro-batch joins the first
    diagnostics.finish()
    with torch.no_grad():
        queries = [model[0].q(i).abs().double() + 1.0 for i in (x, 2 * x)]
    truth = torch.stack([(-(q @ q.mT) / 8**0.5).amax((0, 2, 3)) for q in queries]).amax(0)
    found = diagnostics.history["attention/max_logit"].values[0]
    np.testing.assert_allclose(found, truth, rtol=1e-5)
    assert (found < -1.0).all()
