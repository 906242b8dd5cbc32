"""Double DQN in plain PyTorch: a replay memory, a critic, its averaged copy, and how they act and learn."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.demo.rl.task import Task


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is made of.

    Args:
        task: Name of the environment.
        seed: Of weights, exploration, batches and environment.
        width: Units of a hidden layer.
        depth: Hidden layers.
        lr: Learning rate of Adam.
        batch: Transitions an update.
        gamma: Discount factor.
        average: Share of the critic that goes into its averaged copy at each update.
        random_steps: Environment steps before learning, all of them random.
        explore_steps: Environment steps in which exploration falls to ``epsilon``.
        epsilon: Share of random actions after that.
        memory: Transitions that are kept.
    """

    task: str = "Pendulum-v1"
    seed: int = 0
    width: int = 64
    depth: int = 3
    lr: float = 1e-3
    batch: int = 64
    gamma: float = 0.99
    average: float = 0.005
    random_steps: int = 500
    explore_steps: int = 2000
    epsilon: float = 0.05
    memory: int = 50_000

    def __post_init__(self) -> None:
        for name in ("width", "depth", "lr", "batch", "random_steps", "explore_steps", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gamma", "average", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


def critic(features: int, actions: int, settings: AgentSettings) -> nn.Sequential:
    """A ReLU network from states ``[batch, features]`` to values ``[batch, actions]``.

    Example:
        >>> critic(3, 5, AgentSettings(width=8, depth=2))(torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """
    sizes = [features, *[settings.width] * settings.depth]
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], actions))


class Replay:
    """The last ``size`` transitions.

    Example:
        >>> replay = Replay(size=2, features=1)
        >>> for i in range(3):
        ...     replay.add(np.float32([i]), action=0, reward=0.0, following=np.float32([i + 1]), terminal=False)
        >>> len(replay), sorted(replay.states[:, 0].tolist())
        (2, [1.0, 2.0])
    """

    def __init__(self, size: int, features: int) -> None:
        self.states = np.zeros((size, features), np.float32)
        self.following = np.zeros((size, features), np.float32)
        self.actions = np.zeros(size, np.int64)
        self.rewards = np.zeros(size, np.float32)
        self.terminals = np.zeros(size, np.float32)
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, len(self.actions))

    def add(
        self, state: np.ndarray, *, action: int, reward: float, following: np.ndarray, terminal: bool
    ) -> None:  # fmt: skip
        """In the place of the oldest one."""
        at = self.added % len(self.actions)
        self.states[at], self.following[at] = state, following
        self.actions[at], self.rewards[at], self.terminals[at] = action, reward, terminal
        self.added += 1

    def sample(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """States ``[batch, features]``, actions, rewards, states that followed, and whether those were terminal."""
        parts = (self.states, self.actions, self.rewards, self.following, self.terminals)
        states, actions, rewards, following, terminals = (torch.from_numpy(part[rows]) for part in parts)
        return states, actions, rewards, following, terminals


class Agent:
    """Acts, remembers, and computes the loss of the next update; who owns the optimizer takes the step.

    Example:
        >>> agent = Agent(AgentSettings(task="CartPole-v1", width=8, random_steps=70))
        >>> for _ in range(70):
        ...     agent.act()
        >>> agent.steps, len(agent.returns) > 0, agent.loss().requires_grad
        (70, True, True)
    """

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.task = Task(settings.task, settings.seed)
        torch.manual_seed(settings.seed)
        self.critic = critic(self.task.features, self.task.actions, settings)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.replay = Replay(settings.memory, self.task.features)
        self.steps = 0
        self.returns: list[tuple[int, float]] = []
        """Environment step at which each episode ended, and its undiscounted return."""
        self._rng = np.random.default_rng(settings.seed)

    @property
    def exploration(self) -> float:
        """Share of random actions now."""
        s = self.settings
        if self.steps < s.random_steps:
            return 1.0
        return max(s.epsilon, 1 - (1 - s.epsilon) * self.steps / s.explore_steps)

    def act(self) -> None:
        """One environment step."""
        task = self.task
        if self._rng.random() < self.exploration:
            action = int(self._rng.integers(task.actions))
        else:
            with torch.no_grad():
                action = int(self.critic(torch.from_numpy(task.state)).argmax())
        task.step(action)
        self.replay.add(
            task.state, action=action, reward=task.reward, following=task.following, terminal=task.terminal
        )
        self.steps += 1
        if task.ended:
            self.returns.append((self.steps, task.total))
        task.go_on()

    def loss(self, oldest: int | None = None) -> Tensor:
        """Huber loss of a random batch against double Q-learning targets.

        Args:
            oldest: Draw from the first so many transitions only; None: from all.
        """
        s = self.settings
        rows = self._rng.integers(len(self.replay) if oldest is None else oldest, size=s.batch)
        states, actions, rewards, following, terminals = self.replay.sample(rows)
        with torch.no_grad():
            best = self.critic(following).argmax(1, keepdim=True)
            ahead = self.target(following).gather(1, best)[:, 0]
            targets = rewards + s.gamma * (1 - terminals) * ahead
        values = self.critic(states).gather(1, actions[:, None])[:, 0]
        return F.smooth_l1_loss(values, targets)

    def follow(self) -> None:
        """Moves the averaged copy after an update."""
        with torch.no_grad():
            copies: list[Tensor] = list(self.target.parameters())
            live: list[Tensor] = list(self.critic.parameters())
            torch._foreach_lerp_(copies, live, self.settings.average)
