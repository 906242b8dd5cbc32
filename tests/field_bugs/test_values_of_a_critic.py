"""The values of a critic, and the activations behind them, grow with its returns, and its loss jumps whenever the
target network moves: limits made for classifiers warn of every critic that learns.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.field_bugs.pack import warnings
from traindiag.engine.diagnostics import Diagnostics


def test_a_critic_that_learns_is_left_alone() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    target = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    diagnostics = Diagnostics(critic, optimizer, every_n_steps=5, max_overhead=None, terminal=False, strict=True)
    for step in range(600):
        state = torch.rand(64, 4)
        after = (state + 0.05 * torch.randn(64, 4)).clamp(0, 1)
        with torch.no_grad():
            expected = 1 + state[:, :1] + 0.97 * target(after)  # every step pays, so values go to 50
        with diagnostics.step() as s:
            s.loss((critic(state) - expected).square().mean()).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 19:
            target.load_state_dict(critic.state_dict())
    diagnostics.finish()
    rms = diagnostics.history["activation/rms"].values
    assert (rms[-1] > 4 * rms[0]).mean() >= 0.5 and rms[-1, -1] > 10  # that much growth
    loss = diagnostics.history["loss/value"].values[:, 0]
    assert (loss[20::20] > 2 * loss[19:-1:20]).any()  # and such jumps
    assert {a.rule for a in diagnostics.alerts} >= {"activation/growth"}
    assert warnings(diagnostics.alerts) == []
