"""A job resumed with the model's weights and without the optimizer's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from traindiag import Diagnostics
from traindiag.rules.resumed import OptimizerStateLost


def job(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, state: Any = None) -> Diagnostics:
    diagnostics = Diagnostics(
        model, optimizer, rules=[OptimizerStateLost()], default_rules=False, terminal=False, max_overhead=None
    )
    if state is not None:
        diagnostics.load_state_dict(state)
    for _ in range(steps):
        with diagnostics.step() as step:
            step.loss(model(torch.randint(50, (4, 6))).square().mean()).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
    return diagnostics


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.95)),
        lambda p: torch.optim.SGD(p, lr=1e-2),
    ],
    ids=["adamw", "adam .95", "sgd"],
)
@pytest.mark.parametrize("restored", [True, False])
def test_it_is_told_at_the_first_update(make: Any, restored: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(50, 16), *layers, nn.Linear(16, 3))
    optimizer = make(model.parameters())
    first = job(model, optimizer, 30)
    state = first.state_dict()
    first.finish()
    again = make(model.parameters())
    if restored:
        again.load_state_dict(optimizer.state_dict())
    second = job(model, again, 5, state)
    second.finish()
    told = [(a.step, a.diagnosis) for a in second.alerts]
    adam = not isinstance(optimizer, torch.optim.SGD)
    assert told == ([(30, "resumed without optimizer state")] if adam and not restored else [])
