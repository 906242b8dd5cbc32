"""Target networks and teachers are told from parts that were forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from traindiag.capture.copies import copies
from traindiag.engine.diagnostics import Diagnostics


class Agent(nn.Module):
    """A network, something alike beside it, and a stack with a block that nobody trains."""

    def __init__(self, name: str, **others: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.add_module(name, others.get("other", copy.deepcopy(self.net)))
        self.name = name


def found(agent: Agent) -> bool:
    theirs = {id(p) for p in getattr(agent, agent.name).parameters()}
    got = copies([agent], {id(p) for p in agent.net.parameters()})
    assert got in (set(), theirs)
    return bool(got)


@pytest.mark.parametrize("name", ["net_target", "target_net", "teacher", "ema", "net_ema", "netTarg", "momentum_net"])
def test_by_what_they_are_called(name: str) -> None:
    assert found(Agent(name))


@pytest.mark.parametrize("name", ["other", "net2", "retarget", "schema", "layer_1"])
def test_alike_is_not_enough(name: str) -> None:
    assert not found(Agent(name))


def test_a_name_is_not_enough() -> None:
    assert not found(Agent("target", other=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))))
    assert not found(Agent("target", other=nn.Linear(4, 2)))


def test_one_that_is_trained_is_none() -> None:
    agent = Agent("target")
    assert copies([agent], {id(p) for p in agent.parameters()}) == set()
    assert copies([agent], set()) == set()  # nobody trains either


def test_a_forgotten_block_is_told_and_a_target_is_not() -> None:
    agent = Agent("net_target", other=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    agent.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    trained = [*agent.net.parameters(), *agent.blocks[0].parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    diagnostics = Diagnostics(agent, optimizer, terminal=False, every_n_steps=1, max_overhead=None, strict=True)
    for _ in range(4):
        with diagnostics.step() as step:
            x = agent.blocks[1](agent.blocks[0](agent.net(torch.ones(3, 4))))
            step.loss((x - agent.net_target(torch.zeros(3, 4)).detach()).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(agent.net_target.parameters(), agent.net.parameters()):
                a.lerp_(b, 0.1)
    diagnostics.finish()
    owners = diagnostics.history["wiring/owners"]
    none = {str(c) for c, v in zip(owners.cells, owners.values[-1]) if v == 0}
    assert none == {"blocks.1.weight", "blocks.1.bias"}
    changed = diagnostics.history.get("wiring/frozen_changed")
    assert changed is None or not (changed.values[changed.seen] > 0).any()
    assert not [a for a in diagnostics.alerts if "net_target" in a.where or "net_target" in a.evidence]
