"""Critics of Stable-Baselines3, whose training loop has no place for a line of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.clients.run import flagged, seen_places
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from traindiag.engine.diagnostics import Diagnostics

stable_baselines3 = pytest.importorskip("stable_baselines3")

SMALL: dict[str, Any] = {
    "learning_starts": 40, "buffer_size": 500, "batch_size": 32, "seed": 0, "device": "cpu",
    "policy_kwargs": {"net_arch": [32, 32]},
}  # fmt: skip


def dqn() -> Any:
    return stable_baselines3.DQN("MlpPolicy", "CartPole-v1", target_update_interval=40, **SMALL)


def td3() -> Any:
    return stable_baselines3.TD3("MlpPolicy", "Pendulum-v1", **SMALL)


def left_behind(agent: Any) -> list[torch.Tensor]:
    """Everything that a changed run would have changed: networks, experience, random numbers."""
    experience = [torch.as_tensor(getattr(agent.replay_buffer, n)) for n in ("observations", "actions", "rewards")]
    numpy_state = torch.as_tensor(np.random.get_state()[1].astype(np.int64))  # type: ignore[index, union-attr]
    return [*agent.policy.state_dict().values(), *experience, numpy_state, torch.get_rng_state()]


def trained(
    build: Callable[[], Any], attach: Callable[..., tuple[Any, Any]], steps: int, every: int, **settings: Any
) -> Diagnostics:
    """Trains alone and watched, compares the two bit for bit, and gives back what was seen."""
    alone = build()
    alone.learn(steps)
    expected = left_behind(alone)
    agent = build()
    model, optimizers = attach(agent)
    diagnostics = Diagnostics.attach(
        model, optimizers, every_n_steps=every, max_overhead=None, strict=True, terminal=False, **settings
    )
    agent.learn(steps)
    diagnostics.detach()
    assert all(torch.equal(a, b) for a, b in zip(expected, left_behind(agent), strict=True))
    assert not torch.equal(expected[0], build().policy.state_dict().popitem(last=False)[1])  # it has learnt
    for part in model.values() if isinstance(model, dict) else [model]:
        for optimizer in optimizers.values() if isinstance(optimizers, dict) else [optimizers]:
            assert leftovers(part, optimizer) == NOTHING
    return diagnostics


def rows(diagnostics: Diagnostics, family: str) -> list[tuple[str, set[str]]]:
    return [(row.sight, set(row.places)) for row in diagnostics.coverage if row.family == family]


@pytest.mark.parametrize("whole_policy", [False, True])
def test_q_network_of_dqn(whole_policy: bool) -> None:
    """Its loop calls the network and never the policy that holds network and target."""
    diagnostics = trained(
        dqn, lambda a: (a.policy if whole_policy else a.q_net, a.policy.optimizer), steps=200, every=2
    )
    prefix = "q_net." if whole_policy else ""
    layers = [f"{prefix}q_net.{i}" for i in (0, 2, 4)]
    parameters = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    history = diagnostics.history
    assert history["gradient/norm_applied"].seen.all() and len(history["gradient/norm_applied"]) == 40
    assert history["activation/rms"].cells.labels == tuple(layers)  # the target runs too, and is not taken for it
    assert history["activation/rms"].seen.all() and len(history["activation/rms"]) == 20
    for signal in ("optimizer/update_rms", "optimizer/rms_t", "gradient/zero_fraction", "wiring/ungraded"):
        assert seen_places(history[signal]) == parameters
    for signal in ("wiring/ungraded", "wiring/unchanged"):
        assert flagged(history[signal]) == set()
    if whole_policy:  # the target follows every 40 environment steps: owned by nobody, and changed by design
        target = {f"q_net_target.{name.removeprefix('q_net.')}" for name in parameters}
        assert set(diagnostics.watched.frozen) == target
        assert "wiring/frozen_changed" not in history
        assert seen_places(history["wiring/owners"]) == parameters
    assert rows(diagnostics, "activation") == [("exact", set(layers))]
    assert rows(diagnostics, "gradient") == [("exact", {"Adam"})]
    assert rows(diagnostics, "output") == [("unseen", set())]
    assert rows(diagnostics, "loss") == [("unseen", set())]


def parts(agent: Any) -> tuple[Any, Any]:
    optimizers = {"critic": agent.critic.optimizer, "actor": agent.actor.optimizer}
    return {"critic": agent.critic, "actor": agent.actor}, optimizers


def policy(agent: Any) -> tuple[Any, Any]:
    return agent.policy, parts(agent)[1]


CRITIC = {f"critic.qf{i}.{j}" for i in (0, 1) for j in (0, 2, 4)}
ACTOR = {f"actor.mu.{j}" for j in (0, 2, 4)}


@pytest.mark.parametrize("attach", [parts, policy])
def test_critic_and_delayed_actor_of_td3(attach: Callable[..., tuple[Any, Any]]) -> None:
    """The actor steps at every second update of the critic, which a cadence of 3 meets."""
    diagnostics = trained(td3, attach, steps=250, every=3)
    history = diagnostics.history
    assert diagnostics.updates["critic"] == 2 * diagnostics.updates["actor"] == len(history["gradient/norm_applied"])
    assert history["gradient/norm_applied"].seen.sum(0).tolist() == [210 - 105 * i for i in range(2)]
    assert seen_places(history["activation/rms"]) == CRITIC | ACTOR
    owners = {c.coordinates for c in history["optimizer/update_rms"].cells}
    assert owners == {
        (place.split(".")[0], f"{place}.{kind}") for place in CRITIC | ACTOR for kind in ("weight", "bias")
    }
    assert rows(diagnostics, "optimizer") == [("exact", {"critic", "actor"})]
    assert rows(diagnostics, "activation") == [("exact", CRITIC | ACTOR)]


def test_an_optimizer_that_no_sample_has_met_is_told() -> None:
    """A cadence of 2 meets only updates of the critic alone."""
    diagnostics = trained(td3, parts, steps=100, every=2)
    assert rows(diagnostics, "optimizer") == [("exact", {"critic"}), ("unseen", {"actor"})]
    assert rows(diagnostics, "activation") == [("exact", CRITIC), ("unseen", ACTOR)]
    assert rows(diagnostics, "gradient") == [("exact", {"critic", "actor"})]  # of every step
