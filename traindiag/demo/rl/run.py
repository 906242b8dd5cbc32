"""One agent under a real Lightning trainer with manual optimization, with the callback and nothing else added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from traindiag.demo.fit import fit
from traindiag.demo.rl.agent import Agent, AgentSettings
from traindiag.rules.adaptive_replay import AdaptiveReplayRatio

CHUNK = 10
"""Updates of priming, or environment steps, in what Lightning takes for a batch."""

PRIMING = 2000
PRIMING_LR = 0.4
"""Steps so large that they push most units below zero for all states, for good: Adam's step is about the learning
rate, whatever the gradient. At the ordinary rate the same priming did no lasting harm on so small a task."""

EPISODES = 10
"""Episodes that a return is averaged over."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is made of.

    Args:
        agent: The agent.
        steps: Environment steps, a multiple of ten.
        ratio: Updates per environment step.
        priming: Updates on the first ``primed_on`` transitions while the agent does not act, a multiple of ten.
        primed_at: Environment step at which that happens, a multiple of ten.
        priming_lr: Learning rate of those.
        primed_on: As above.
        reset: Whether the critic gets fresh weights after priming, all else as it was.
    """

    agent: AgentSettings = field(default_factory=AgentSettings)
    steps: int = 4000
    ratio: float = 1.0
    priming: int = 0
    primed_at: int = 1000
    priming_lr: float = PRIMING_LR
    primed_on: int = 200
    reset: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "priming", "primed_at"):
            if getattr(self, name) < 0 or getattr(self, name) % CHUNK:
                raise ValueError(f"{name} must be a multiple of {CHUNK}, got {getattr(self, name)}")
        first = self.agent.random_steps
        if first % CHUNK or not first < self.steps:
            raise ValueError(f"random_steps must be a multiple of {CHUNK} and less than steps, got {first}")
        if self.priming and not first <= self.primed_at < self.steps:
            raise ValueError(f"primed_at must be {first} to {self.steps}, got {self.primed_at}")
        if self.priming and not 0 < self.primed_on <= first:
            raise ValueError(f"primed_on must be 1 to {first}, got {self.primed_on}")
        for name in ("ratio", "priming_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def batches(self) -> int:
        """What Lightning counts: a batch is ten updates of priming or ten environment steps."""
        return (self.priming + self.steps - self.agent.random_steps) // CHUNK

    @property
    def primed(self) -> range:
        """Those batches that are priming."""
        first = (self.primed_at - self.agent.random_steps) // CHUNK
        return range(first, first + self.priming // CHUNK)

    def env_step(self, step: int) -> int:
        """Environment steps that were done when a step of Lightning's, which the diagnostics name, was over."""
        of_priming = min(max(0, step + 1 - self.primed.start), len(self.primed))
        return self.agent.random_steps + (step + 1 - of_priming) * CHUNK


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Args:
        settings: What was run.
        returns: Environment step at which each episode ended, and its return.
        seconds: Wall clock of the fit.
        log_dir: Folder of its event file, None without a log.
    """

    settings: Settings
    returns: tuple[tuple[int, float], ...]
    seconds: float
    log_dir: Path | None

    @property
    def last(self) -> float:
        """Mean return of the last episodes."""
        last = [r for _, r in self.returns[-EPISODES:]]
        return sum(last) / len(last)


class Learner(LightningModule):
    """Double DQN with one optimizer that is stepped by hand, as often as the replay ratio says."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.agent = Agent(settings.agent)
        self.critic, self.target = self.agent.critic, self.agent.target
        self.pace = AdaptiveReplayRatio(settings.ratio, settings.ratio)

    def on_train_start(self) -> None:
        """Transitions to begin with."""
        while self.agent.steps < self.settings.agent.random_steps:
            self.agent.act()

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:
        """Ten updates of priming, or ten environment steps with the updates that belong to them."""
        s = self.settings
        if index in s.primed:
            for _ in range(CHUNK):
                self._update(s.priming_lr, s.primed_on)
        else:
            if s.reset and index == s.primed.stop:
                self._reset()
            for _ in range(CHUNK):
                self.agent.act()
                for _ in range(self.pace.updates()):
                    self._update(s.agent.lr, None)
        recent = [r for _, r in self.agent.returns[-EPISODES:]]
        if recent:
            self.log("return", sum(recent) / len(recent), prog_bar=True)
        self.log("environment_steps", float(self.agent.steps))
        self.log("replay_ratio", self.pace.ratio)
        self.log("learning_rate", s.priming_lr if index in s.primed else s.agent.lr)

    def _update(self, lr: float, oldest: int | None) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = self.agent.loss(oldest)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.agent.follow()

    def _reset(self) -> None:
        fresh = Agent(self.settings.agent).critic
        self.critic.load_state_dict(fresh.state_dict())
        self.target.load_state_dict(fresh.state_dict())
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.state.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the critic; the averaged copy belongs to no optimizer."""
        return torch.optim.Adam(self.critic.parameters(), lr=self.settings.agent.lr)


def train(settings: Settings, callbacks: Sequence[Callback] = (), log_root: Path | None = None) -> Outcome:
    """Trains one agent; the numbers are the same with any callbacks that only watch.

    Args:
        settings: What to run.
        callbacks: Such as ``[TrainingDiagnostics(monitors=[CriticPlasticity("critic")])]``.
        log_root: Where a new ``version_N`` folder is made; None logs nothing and shows no progress.
    """
    seed_everything(settings.agent.seed, verbose=False)
    module = Learner(settings)
    counting: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(settings.batches)), batch_size=None)
    with _one_thread():
        seconds, log_dir = fit(module, counting, callbacks, log_root)
    return Outcome(settings, tuple(module.agent.returns), seconds, log_dir)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small wait longer for a second thread than it takes off them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
