"""CriticPlasticity in the loops that people have: Lightning's usual RL shapes, and Stable-Baselines3."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.clients.test_stable_baselines import SMALL, dqn, td3, trained
from traindiag import CriticPlasticity, TrainingDiagnostics
from traindiag.record.series import History

stable_baselines3 = pytest.importorskip("stable_baselines3")


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


class Replay(IterableDataset[tuple[Tensor, Tensor]]):
    """Yields from a buffer that grows while training runs, without an end."""

    def __init__(self) -> None:
        self.buffer: deque[tuple[Tensor, Tensor]] = deque(maxlen=200)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.buffer[int(torch.randint(len(self.buffer), ()))]


class Agent(LightningModule):
    """States by a random walk; the critic is fitted to rewards and to its own target."""

    def __init__(self) -> None:
        super().__init__()
        self.replay, self.state = Replay(), torch.zeros(4)
        self.critic, self.actor = mlp(5, 1), nn.Sequential(mlp(4, 1), nn.Tanh())
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def on_fit_start(self) -> None:
        for _ in range(32):
            self.act()

    def act(self) -> None:
        action = torch.rand(1) * 2 - 1
        self.replay.buffer.append((self.state, action))
        self.state = 0.9 * self.state + action + 0.1 * torch.randn(4)

    def critic_loss(self, batch: Any) -> Tensor:
        states, actions = batch
        pairs = torch.cat([states, actions], 1)
        with torch.no_grad():
            wanted = -states.square().sum(1, keepdim=True) + 0.9 * self.target(pairs)
        return (self.critic(pairs) - wanted).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.replay, batch_size=16)


class Automatic(Agent):
    """As Lightning's own DQN example: a deque in an iterable dataset, one optimizer, a target that no one trains."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.act()
        return self.critic_loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.critic.parameters(), lr=1e-3)


class Manual(Agent):
    """Two updates of the critic and one of the actor in a batch, which goes through the critic too."""

    def __init__(self, use_pl_optimizer: bool = True) -> None:
        super().__init__()
        self.automatic_optimization, self.wrapped = False, use_pl_optimizer

    def training_step(self, batch: Any, _: int) -> None:  # type: ignore[override]
        self.act()
        critic, actor = self.optimizers(use_pl_optimizer=self.wrapped)  # type: ignore[misc]
        for _ in range(2):
            critic.zero_grad()
            self.manual_backward(self.critic_loss(batch))
            critic.step()
        states = batch[0]
        actor.zero_grad()
        self.manual_backward(-self.critic(torch.cat([states, self.actor(states)], 1)).mean())
        actor.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.critic.parameters(), lr=1e-3), torch.optim.SGD(self.actor.parameters(), lr=1e-3)
        ]  # fmt: skip


def fit(build: Callable[[], Agent], batches: int, *monitors: CriticPlasticity) -> tuple[Any, ...]:
    """Parameters, experience and random state that a run leaves, and what was seen of it."""
    seed_everything(0, verbose=False)
    agent = build()
    callbacks = []
    if monitors:
        known: dict[str, Any] = {"terminal": False, "strict": True, "max_overhead": None}
        callbacks = [TrainingDiagnostics(monitors=monitors, **known)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=batches, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        ).fit(agent)  # fmt: skip
    states = [torch.stack([s for s, _ in agent.replay.buffer]), torch.get_rng_state()]
    history = callbacks[0].history if callbacks else None
    return [p.detach().clone() for p in agent.parameters()] + states, history


def compared(build: Callable[[], Agent], batches: int, monitor: CriticPlasticity) -> History:
    """The run with the monitor is the run without it."""
    alone, _ = fit(build, batches)
    left, history = fit(build, batches, monitor)
    assert all(torch.equal(a, b) for a, b in zip(alone, left, strict=True))
    assert isinstance(history, History)
    return history


def test_automatic_optimization_with_an_iterable_replay_dataset() -> None:
    history = compared(Automatic, 45, CriticPlasticity("critic", gamma=0.9, reward_bound=10.0, every=20, states=128))
    assert history["plasticity/updates"].values[:, 0].tolist() == [16, 20, 40]
    assert history["plasticity/q_bound_ratio"].seen.all()
    assert {c.coordinates for c in history["plasticity/fau"].cells} == {("critic", f"critic.{i}") for i in (0, 2)}


@pytest.mark.parametrize("wrapped", [True, False])
def test_manual_optimization_with_several_optimizers(wrapped: bool) -> None:
    monitor = CriticPlasticity(["critic", "actor"], values="critic", every=20, states=128)
    history = compared(lambda: Manual(wrapped), 25, monitor)
    assert history["plasticity/updates"].values[:, 0].tolist() == [16, 20, 40]  # of the critic: two a batch
    assert history["plasticity/updates"].steps.tolist() == [7, 9, 19]
    assert {c.coordinates[0] for c in history["plasticity/fau"].cells} == {"critic", "actor"}
    assert {c.coordinates[0] for c in history["plasticity/q_max_abs"].cells} == {"critic"}
    assert [c.coordinates for c in history["plasticity/saturation"].cells] == [("actor", "actor.0.4")]


def sac() -> Any:
    return stable_baselines3.SAC("MlpPolicy", "Pendulum-v1", **SMALL)


def parts(agent: Any) -> tuple[Any, Any]:
    optimizers = {"critic": agent.critic.optimizer, "actor": agent.actor.optimizer}
    return {"critic": agent.critic, "actor": agent.actor}, optimizers


@pytest.mark.parametrize(
    ("build", "attach", "module", "layers", "gap"),
    [
        (dqn, lambda a: (a.q_net, a.policy.optimizer), "QNetwork", {"q_net.0", "q_net.2"}, False),
        (td3, parts, "critic", {f"critic.qf{i}.{j}" for i in (0, 1) for j in (0, 2)}, True),
        (sac, parts, "critic", {f"critic.qf{i}.{j}" for i in (0, 1) for j in (0, 2)}, True),
    ],
)
def test_critics_of_stable_baselines(
    build: Callable[[], Any], attach: Callable[..., tuple[Any, Any]], module: str, layers: set[str], gap: bool
) -> None:
    monitor = CriticPlasticity(module, gamma=0.99, reward_bound=17.0, every=20, states=128)
    diagnostics = trained(build, attach, steps=220, every=50, monitors=[monitor])
    history = diagnostics.history
    assert history["plasticity/updates"].values[:3, 0].tolist() == [16, 20, 40]
    assert {c.coordinates[1] for c in history["plasticity/fau"].cells} == layers
    assert ("plasticity/twin_gap" in history) is gap and ("plasticity/churn" in history) is not gap
    assert history["plasticity/q_max_abs"].seen.all() and history["plasticity/srank_99"].seen.all()
