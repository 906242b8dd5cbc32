"""The RL demo: its agent, what counts as suffering, and the story it tells of a real run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from traindiag import AdaptiveReplayRatio, TrainingDiagnostics
from traindiag.cli import app
from traindiag.demo.rl.agent import Agent, AgentSettings, Replay
from traindiag.demo.rl.run import CHUNK, PRIMING, Learner, Settings, train
from traindiag.demo.rl.show import monitor, show
from traindiag.demo.rl.story import onset, recent
from traindiag.demo.rl.task import Task
from traindiag.monitors.critic_plasticity import CriticPlasticity

SMALL = AgentSettings(width=8, depth=2, batch=8, random_steps=100)
TINY = Settings(SMALL, steps=400, priming=100, primed_at=200, primed_on=50)

Returns = list[tuple[int, float]]
episodes = st.lists(st.tuples(st.integers(1, 60), st.integers(-9, 9)), min_size=1, max_size=30)


def ended(lengths: list[tuple[int, int]]) -> Returns:
    at = np.cumsum([10 * n for n, _ in lengths])
    return [(int(s), float(r)) for s, (_, r) in zip(at, lengths)]


# -- task and agent ----------------------------------------------------------------------------


def test_an_episode_that_is_cut_off_is_not_terminal() -> None:
    pendulum = Task("Pendulum-v1", seed=0)
    for _ in range(200):
        pendulum.step(0)
        before = pendulum.following
        last = (pendulum.ended, pendulum.terminal, pendulum.total)
        pendulum.go_on()
    assert last[:2] == (True, False) and last[2] < -200
    assert not np.array_equal(pendulum.state, before), "a new episode"
    pendulum.step(0)
    assert pendulum.total == pendulum.reward


def test_a_pole_that_falls_is_terminal() -> None:
    pole = Task("CartPole-v1", seed=0)
    while not pole.ended:
        pole.step(0)
        pole.go_on()
    assert pole.terminal and 5 < pole.total < 20


def test_torques_are_evenly_spaced() -> None:
    pendulum = Task("Pendulum-v1", seed=0)
    speeds = []
    for action in range(pendulum.actions):
        same = Task("Pendulum-v1", seed=0)
        same.step(action)
        speeds.append(float(same.following[2]))
    np.testing.assert_allclose(np.diff(speeds), 3.0 * 1.0 * 0.05, rtol=1e-4)  # 3 / (m l**2) * torque * dt


def test_a_task_of_many_torques_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium

    class Walker:
        action_space = gymnasium.spaces.Box(-1, 1, (6,))

    monkeypatch.setattr(gymnasium, "make", lambda name: Walker())
    with pytest.raises(ValueError, match="few actions or one torque, Walker has Box"):
        Task("Walker", seed=0)


@given(st.integers(1, 5), st.integers(0, 12))
def test_replay_keeps_the_last_transitions(size: int, count: int) -> None:
    replay = Replay(size, features=1)
    for i in range(count):
        replay.add(np.float32([i]), action=i, reward=float(i), following=np.float32([i + 1]), terminal=bool(i % 2))
    kept = sorted(range(count)[-size:])
    assert len(replay) == len(kept)
    if kept:
        states, actions, rewards, following, terminals = replay.sample(np.arange(len(kept)))
        order = actions.argsort()
        assert actions[order].tolist() == rewards[order].tolist() == kept
        assert states[order, 0].tolist() == kept and following[order, 0].tolist() == [k + 1 for k in kept]
        assert terminals[order].tolist() == [k % 2 for k in kept]


def test_loss_is_that_of_double_q_learning() -> None:
    agent = Agent(replace(SMALL, task="CartPole-v1", batch=64))
    for _ in range(100):
        agent.act()
    with torch.no_grad():
        for p in agent.target[-1].parameters():
            p.neg_()  # or both networks would agree
    agent._rng = np.random.default_rng(3)
    found = agent.loss(oldest=60).item()
    rows = np.random.default_rng(3).integers(60, size=64)
    r = agent.replay
    with torch.no_grad():
        live, copy = (net(torch.from_numpy(r.following[rows])).numpy() for net in (agent.critic, agent.target))
        values = agent.critic(torch.from_numpy(r.states[rows])).numpy()
    assert (live.argmax(1) != copy.argmax(1)).all()
    errors = []
    for k, row in enumerate(rows):
        ahead = 0.0 if r.terminals[row] else copy[k, np.argmax(live[k])]
        error = abs(values[k, r.actions[row]] - (r.rewards[row] + 0.99 * ahead))
        errors.append(error**2 / 2 if error < 1 else error - 0.5)
    assert any(r.terminals[rows]) and not all(r.terminals[rows])
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_copy_moves_its_share_and_has_no_gradients() -> None:
    agent = Agent(replace(SMALL, average=0.25))
    before = [p.clone() for p in agent.target.parameters()]
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.add_(1.0)
    agent.follow()
    for now, then in zip(agent.target.parameters(), before):
        torch.testing.assert_close(now, then + 0.25)
    assert not any(p.requires_grad for p in agent.target.parameters())


def test_exploration_falls_from_all_to_epsilon() -> None:
    agent = Agent(AgentSettings(task="CartPole-v1", width=8, random_steps=10, explore_steps=100, epsilon=0.1))
    seen = {}
    for agent.steps in (0, 9, 10, 50, 100, 500):
        seen[agent.steps] = round(agent.exploration, 4)
    assert seen == {0: 1.0, 9: 1.0, 10: 0.91, 50: 0.55, 100: 0.1, 500: 0.1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 405}, "steps must be a multiple of 10, got 405"),
        ({"priming": -10}, "priming must be a multiple of 10, got -10"),
        ({"primed_at": 50}, "primed_at must be 100 to 400, got 50"),
        ({"primed_at": 400}, "primed_at must be 100 to 400, got 400"),
        ({"steps": 100}, "random_steps must be a multiple of 10 and less than steps, got 100"),
        ({"primed_on": 101}, "primed_on must be 1 to 100, got 101"),
        ({"ratio": 0.0}, "ratio must be positive, got 0.0"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)
    with pytest.raises(ValueError, match="epsilon must be between 0 and 1, got 2"):
        AgentSettings(epsilon=2)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        AgentSettings(width=0)


# -- what counts as suffering ------------------------------------------------------------------


@given(episodes, episodes, episodes, st.sampled_from([0.5, 3.0]))
def test_onset_is_the_start_of_the_last_stay_below(
    mine: list[tuple[int, int]], one: list[tuple[int, int]], other: list[tuple[int, int]], margin: float
) -> None:
    def level(returns: Returns, step: int) -> float | None:
        last = [r for s, r in returns if s <= step][-10:]
        return float(np.mean(last)) if last else None

    run, healthy = ended(mine), [ended(one), ended(other)]
    below = []
    for step in range(100, 1001, 100):
        levels = [level(r, step) for r in (run, *healthy)]
        known = [x for x in levels if x is not None]
        below.append(len(known) == 3 and known[0] < min(known[1:]) - margin)
    stays = [i for i in range(10) if all(below[i:])]
    found = onset(run, healthy, steps=1000, margin=margin)
    assert found == ((stays[0] + 1) * 100 if stays else None)
    assert recent(run, 0) is None


# -- runs --------------------------------------------------------------------------------------


def test_updates_priming_and_environment_steps_are_those_that_were_asked_for() -> None:
    diagnostics = TrainingDiagnostics(monitors=[monitor(TINY)], every_n_steps=1, max_overhead=None, terminal=False)
    settings = replace(TINY, ratio=0.5)
    train(settings, [diagnostics])
    steps = diagnostics.history["logged/environment_steps"]
    assert len(steps) == settings.batches == 40
    expected = [min(100 + 10 * (b + 1), 200) if b < 20 else 200 + 10 * (b - 19) for b in range(40)]
    assert steps.values[:, 0].tolist() == expected == [settings.env_step(b) for b in range(40)]
    rates = diagnostics.history["logged/learning_rate"].values[:, 0]
    assert [i for i, rate in enumerate(rates) if rate > 0.1] == list(settings.primed) == list(range(10, 20))
    looks = diagnostics.history["plasticity/updates"].values[:, 0]
    assert looks.tolist() == [20, 200], "50 before priming, 100 in it, 100 after it"


def test_ratio_gives_updates() -> None:
    for ratio, updates in ((0.5, 150), (2.0, 600)):
        learner = Learner(Settings(SMALL, steps=400, ratio=ratio))
        done: list[float] = []
        learner._update = lambda lr, oldest, done=done: done.append(lr)  # type: ignore[method-assign,misc]
        learner.log = lambda *args, **keywords: None  # type: ignore[method-assign,assignment]
        learner.on_train_start()
        for index in range(learner.settings.batches):
            learner.training_step([], index)
        assert (len(done), learner.agent.steps) == (updates, 400)


def test_a_run_is_the_same_with_the_callback(tmp_path: Path) -> None:
    bare = train(TINY)
    diagnostics = TrainingDiagnostics(monitors=[monitor(TINY)], terminal=False)
    watched = train(TINY, [diagnostics], tmp_path)
    assert bare.returns == watched.returns and len(bare.returns) == 2
    assert bare.log_dir is None and watched.log_dir is not None


def test_reset_gives_the_critic_its_first_weights() -> None:
    learner = Learner(replace(TINY, reset=True))
    first = [p.detach().clone() for p in learner.critic.parameters()]
    with torch.no_grad():
        for p in (*learner.critic.parameters(), *learner.target.parameters()):
            p.zero_()
    optimizer = torch.optim.Adam(learner.critic.parameters())
    optimizer.state[next(learner.critic.parameters())] = {"step": 3}
    learner.optimizers = lambda *args, **keywords: optimizer  # type: ignore[method-assign,assignment]
    learner._reset()
    for live, copy, then in zip(learner.critic.parameters(), learner.target.parameters(), first):
        assert torch.equal(live, then) and torch.equal(copy, then)
    assert not optimizer.state


class _Adaptive(Learner):
    """Follows what the diagnostics measure, and goes on from a checkpoint."""

    def __init__(self, settings: Settings, diagnostics: TrainingDiagnostics) -> None:
        super().__init__(settings)
        self.diagnostics = diagnostics
        self.pace = AdaptiveReplayRatio(interval=100, tau=0.5)

    def training_step(self, batch: Any, index: int) -> None:
        super().training_step(batch, index)
        self.pace.follow(self.diagnostics.history, env_step=self.agent.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["replay"] = self.pace.state_dict()


def test_adaptive_ratio_follows_the_diagnostics_under_lightning(tmp_path: Path) -> None:
    diagnostics = TrainingDiagnostics(
        monitors=[CriticPlasticity("critic", every=10)], every_n_steps=1, max_overhead=None, terminal=False
    )
    learner = _Adaptive(Settings(SMALL, steps=400), diagnostics)
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(30)), batch_size=None)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[diagnostics], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(learner, loader)
    switched = learner.pace.switched_at
    assert switched in (200, 300)
    ratios = diagnostics.history["logged/replay_ratio"]
    assert set(ratios.values[:, 0].tolist()) == {0.5, 2.0}
    values = diagnostics.history["plasticity/fau_pooled"].values[:, 0]
    assert learner.pace.state_dict()["first"] == pytest.approx(values[0])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)["replay"]
    again = AdaptiveReplayRatio(interval=100, tau=0.5)
    again.load_state_dict(stored)
    assert (again.ratio, again.switched_at, again.state_dict()) == (2.0, switched, learner.pace.state_dict())


# -- what its user sees ------------------------------------------------------------------------


def test_the_demo_tells_both_stories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy, primed = show(0, tmp_path / "a b", TINY)
    assert healthy.outcome.settings.priming == 0 and primed.outcome.settings == TINY
    text = " ".join(capsys.readouterr().out.split())
    assert "What happened to the healthy critic" in text and "What happened to the primed critic" in text
    assert f"return {primed.outcome.last:,.0f} over the last 10 episodes; the healthy agent has" in text
    assert "active units" in text and "tensorboard --logdir" in text
    for name in ("rl-healthy", "rl-primed"):
        assert list((tmp_path / "a b" / name / "version_0").glob("events.out.tfevents.*"))


def test_without_gymnasium_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    done = CliRunner().invoke(app, ["demo", "rl", "--log-dir", str(tmp_path)])
    assert done.exit_code == 2 and "traindiag[rl]" in done.output


def test_the_demo_primes_for_as_many_batches_as_it_has_updates() -> None:
    assert len(Settings(priming=PRIMING).primed) * CHUNK == PRIMING
