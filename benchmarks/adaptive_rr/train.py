"""One run in a plain loop: the agent of the RL demo, and a replay ratio that is fixed or chosen."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from traindiag import AdaptiveReplayRatio
from traindiag.demo.rl.agent import Agent, AgentSettings

LOW, HIGH = 0.5, 2.0
ARMS = ("low", "high", "adaptive")
STEPS = {"CartPole-v1": 4000, "Pendulum-v1": 5000}
"""Environment steps of a run."""

INTERVALS = 40
"""In a run: the paper tests every 50,000 of 2,000,000 environment steps on the DeepMind Control suite."""


def settings() -> dict[str, Any]:
    """Everything that a stored run depends on, as plain data."""
    agent = {k: v for k, v in asdict(AgentSettings()).items() if k not in ("task", "seed")}
    return {"low": LOW, "high": HIGH, "steps": dict(STEPS), "intervals": INTERVALS, "agent": agent}


class ActiveUnits:
    """Fraction of active units of a critic in the forward pass of the loss, as in the paper: at no cost.

    Example:
        >>> critic = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> nn.init.zeros_(critic[0].weight), nn.init.constant_(critic[0].bias, 1.0)  # doctest: +ELLIPSIS
        (...)
        >>> active = ActiveUnits(critic)
        >>> _ = critic(torch.zeros(8, 2))
        >>> active.take()
        1.0
    """

    def __init__(self, critic: nn.Module) -> None:
        self._active, self._all = 0.0, 0
        for module in critic.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if torch.is_grad_enabled():
            self._active += float((out.detach() > 0).sum())
            self._all += out.numel()

    def take(self) -> float:
        """That of the passes since the last call."""
        fraction = self._active / self._all
        self._active, self._all = 0.0, 0
        return fraction


def controller(arm: str, steps: int) -> AdaptiveReplayRatio:
    """The controller of an arm; a fixed ratio is one that has nowhere to go."""
    low, high = {"low": (LOW, LOW), "high": (HIGH, HIGH), "adaptive": (LOW, HIGH)}[arm]
    return AdaptiveReplayRatio(low, high, interval=steps // INTERVALS, min_values=30)


def train(task: str, arm: str, seed: int) -> dict[str, Any]:
    """Returns of one run, its FAU over time, and when the controller switched."""
    torch.set_num_threads(1)
    agent = Agent(AgentSettings(task=task, seed=seed))
    optimizer = torch.optim.Adam(agent.critic.parameters(), lr=agent.settings.lr)
    active = ActiveUnits(agent.critic)
    pace = controller(arm, STEPS[task])
    began, done, faus = time.process_time(), 0, []
    while agent.steps < STEPS[task]:
        agent.act()
        if agent.steps <= agent.settings.random_steps:
            continue
        for _ in range(pace.updates()):
            loss = agent.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.follow()
            faus.append((agent.steps, active.take()))
            pace.update(faus[-1][1], env_step=agent.steps)
            done += 1
    parts = [faus[i : i + 50] for i in range(0, done, max(1, done // 20))]
    return {
        "last": round(mean_of_last_quarter(agent.returns, STEPS[task]), 2),
        "whole": round(sum(r for _, r in agent.returns) / len(agent.returns), 2),
        "switched_at": pace.switched_at if arm == "adaptive" else None,
        "updates": done,
        "fau": [round(sum(f for _, f in part) / len(part), 4) for part in parts],
        "cpu_seconds": round(time.process_time() - began, 1),
        "returns": [(step, round(value, 1)) for step, value in agent.returns],
    }


def mean_of_last_quarter(returns: list[tuple[int, float]], steps: int) -> float:
    """Mean return of the episodes that ended in the last quarter of the steps.

    Example:
        >>> mean_of_last_quarter([(10, 1.0), (75, 3.0), (80, 5.0), (100, 7.0)], steps=100)
        6.0
    """
    last = [value for step, value in returns if step > 0.75 * steps] or [returns[-1][1]]
    return sum(last) / len(last)
