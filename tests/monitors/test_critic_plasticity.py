"""CriticPlasticity: true numbers, no trace in the run, one run over several jobs, and plain words for bad input."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from traindiag.capture.stored_states import StoredStates
from traindiag.capture.trainability import trainability
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.lanes import MonitorFault
from traindiag.monitors.critic_plasticity import CriticPlasticity
from traindiag.record.series import History


class Modules(nn.Module):
    """Its activations are modules, in place among them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Functions(Modules):
    """The same, with functions and methods."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body[0](x))
        return self.body[4](self.body[2](h).relu())  # type: ignore[no-any-return]


class Delicate(nn.Module):
    """All that a careless forward pass would change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh()
        )
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def agent(kind: Callable[[], nn.Module] = Modules, seed: int = 0) -> nn.ModuleDict:
    """A critic with its target, which no optimizer owns."""
    torch.manual_seed(seed)
    critic = kind()
    target = copy.deepcopy(critic).requires_grad_(False)
    return nn.ModuleDict({"critic": critic, "target": target})


def learn(
    model: nn.ModuleDict,
    monitor: CriticPlasticity | None,
    steps: int = 60,
    *,
    batch: int = 32,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    begin: int = 0,
    **settings: Any,
) -> Diagnostics | None:
    """Fits the critic to noisy values of its target, with batches that depend on the step."""
    optimizer = optimizer or torch.optim.Adam(model["critic"].parameters(), lr=1e-2)
    diagnostics = None
    if monitor is not None:
        known = {"terminal": False, "strict": True, "max_overhead": None, "monitors": [monitor], **settings}
        diagnostics = Diagnostics(model, optimizer, **known)
        if state is not None:
            diagnostics.load_state_dict(state)
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        if diagnostics is not None:
            diagnostics.begin()
        x = torch.randn(batch, 4, generator=generator)
        with torch.no_grad():
            wanted = 1.0 + model["target"](x) + torch.randn(batch, 1, generator=generator)
        loss = (model["critic"](x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if diagnostics is not None:
            diagnostics.end()
    return diagnostics


def watched(model: nn.ModuleDict, monitor: CriticPlasticity, steps: int = 60, **how: Any) -> History:
    diagnostics = learn(model, monitor, steps, **how)
    assert diagnostics is not None
    diagnostics.finish()
    return diagnostics.history


def values(history: History, metric: str) -> dict[str, float]:
    """The last values of a signal, by the last coordinate."""
    series = history[f"plasticity/{metric}"]
    return {str(c.coordinates[-1]): float(v) for c, v in zip(series.cells, series.values[-1])}


# -- true numbers


@pytest.mark.parametrize("kind", [Modules, Functions])
def test_numbers_are_those_of_the_network_as_it_is_after_the_update(kind: type[Modules]) -> None:
    model, probe = agent(kind), torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    first = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model["critic"].parameters()))
    monitor = CriticPlasticity("critic", probe=probe, gamma=0.9, reward_bound=2.0, every=30)
    history = watched(model, monitor, steps=60)
    assert history["plasticity/fau"].steps.tolist() == [15, 29, 59]
    assert values(history, "updates") == {"critic": 60}

    weights = [
        (m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model["critic"].body if hasattr(m, "weight")
    ]
    x, layers = probe.numpy(), []
    for w, b in weights[:-1]:
        layers.append(x @ w.T + b)
        x = np.maximum(layers[-1], 0)
    named = dict(zip(("critic.body.0", "critic.body.2"), layers))
    for name, a in named.items():
        active = a > 0
        assert values(history, "fau")[name] == pytest.approx(active.mean(), abs=1e-3)
        assert values(history, "dead")[name] == pytest.approx((active.mean(0) < 0.01).mean(), abs=0.04)
        assert values(history, "zombie")[name] == pytest.approx((active.mean(0) > 0.99).mean(), abs=0.04)
        h = np.maximum(a, 0).mean(0)
        assert values(history, "dormant_100")[name] == pytest.approx((h / h.mean() <= 0.1).mean(), abs=0.04)
        assert values(history, "preactivation_norm")[name] == pytest.approx(
            np.linalg.norm(a, axis=1).mean(), rel=1e-4
        )
    pooled = sum((a > 0).sum() for a in layers) / sum(a.size for a in layers)
    assert values(history, "fau_pooled")["critic"] == pytest.approx(pooled, abs=1e-3)
    s = np.linalg.svd(x, compute_uv=False)
    assert values(history, "srank_99") == {"critic.body.2": (np.cumsum(s) / s.sum() < 0.99).sum() + 1}
    norm = math.sqrt(sum((w**2).sum() + (b**2).sum() for w, b in weights))
    assert values(history, "weight_norm_ratio")["critic"] == pytest.approx(norm / first, rel=1e-4)
    largest = values(history, "q_max_abs")["critic"]
    assert values(history, "q_bound_ratio")["critic"] == pytest.approx(largest * 0.1 / 2.0)


def test_functions_and_modules_are_seen_alike() -> None:
    found = []
    for kind in (Modules, Functions):
        history = watched(agent(kind), CriticPlasticity("critic", every=30, states=256))
        found.append({name: history[name].values.tolist() for name in history if name.startswith("plasticity/")})
    assert found[0] == found[1] and len(found[0]) > 15


def test_fresh_states_are_the_last_ones_and_fixed_ones_the_first() -> None:
    model = agent()
    monitor = CriticPlasticity("critic", every=40, states=512)
    watched(model, monitor, steps=20)
    rows = [torch.randn(32, 4, generator=torch.Generator().manual_seed(step)) for step in range(16)]
    kept = monitor.state_dict()["modules"]["critic"]
    assert torch.equal(kept["fixed"]["args"][0], torch.cat(rows))
    assert kept["fresh"] == {}  # the next look is 20 updates away
    monitor = CriticPlasticity("critic", every=40, states=64)
    watched(agent(), monitor, steps=39)
    rows = [torch.randn(32, 4, generator=torch.Generator().manual_seed(s))[::8] for s in range(24, 39)]
    assert torch.equal(monitor.state_dict()["modules"]["critic"]["fresh"]["args"][0], torch.cat(rows))


def test_updates_are_those_of_the_optimizer_that_owns_the_module() -> None:
    """An actor that steps at every second update of the critic."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"critic": Modules(), "actor": Delicate()})
    optimizers = {name: torch.optim.SGD(model[name].parameters(), lr=1e-2) for name in model}
    monitor = CriticPlasticity("actor", every=20, states=128, values=False)
    diagnostics = Diagnostics(model, optimizers, terminal=False, strict=True, monitors=[monitor])
    for step in range(90):
        with diagnostics.step():
            for name in ("critic", *["actor"] * (step % 2)):
                model[name](torch.randn(16, 4)).square().mean().backward()
                optimizers[name].step()
    diagnostics.finish()
    history = diagnostics.history
    assert history["plasticity/updates"].values[:, 0].tolist() == [16, 20, 40]
    assert history["plasticity/updates"].steps.tolist() == [31, 39, 79]
    assert "plasticity/q_max_abs" not in history and "plasticity/churn" not in history


class Twin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2 = Modules(), Modules()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q1(x), self.q2(x)


@pytest.mark.parametrize("module", ["critic", ["critic.q1", "critic.q2"], "critic.q?"])
def test_gap_of_twins_whether_they_are_one_module_or_two(module: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"critic": Twin()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    monitor = CriticPlasticity(module, states=64)
    diagnostics = Diagnostics(model, optimizer, terminal=False, strict=True, monitors=[monitor])
    seen = []
    for _ in range(16):
        with diagnostics.step():
            seen.append(torch.randn(8, 4))
            sum(q.square().mean() for q in model["critic"](seen[-1])).backward()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    series = diagnostics.history["plasticity/twin_gap"]
    with torch.no_grad():
        q1, q2 = model["critic"](torch.cat([x[::2] for x in seen]))
    assert series.values.tolist() == [[pytest.approx((q1 - q2).abs().mean().item(), rel=1e-5)]]
    assert {c.coordinates[0] for c in series.cells} <= {"critic", "critic.q1"}


def test_a_squashing_output_is_no_hidden_layer() -> None:
    class Actor(Modules):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    history = watched(agent(Actor), CriticPlasticity("critic", states=256))
    assert set(values(history, "fau")) == {"critic.body.0", "critic.body.2"}
    assert set(values(history, "saturation")) == {"critic.body.4"}
    assert set(values(history, "srank_99")) == {"critic.body.2"}


def test_tanh_units_saturate_and_are_no_zombies() -> None:
    model = agent(Delicate)
    with torch.no_grad():
        model["critic"].body[4].bias[:8] = 30.0
    history = watched(model, CriticPlasticity("critic", states=256), steps=16)
    assert values(history, "saturation") == {"critic.body.4": pytest.approx(0.5, abs=0.02)}
    assert set(values(history, "zombie")) == {"critic.body.1"}  # behind the normalisation


def test_feature_maps_are_units_and_positions_count_for_the_active_fraction() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3)
            self.head = nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x.reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2))).flatten(1))  # type: ignore[no-any-return]

    model = agent(Pixels)
    with torch.no_grad():
        model["critic"].conv.bias[:] = torch.tensor([-100.0] * 3 + [1.0] * 3)
    history = watched(model, CriticPlasticity("critic", states=256), steps=16)
    assert values(history, "dead") == {"critic.conv": pytest.approx(0.5, abs=1e-6)}
    assert 0.25 < values(history, "fau")["critic.conv"] < 0.5


def test_explained_variance_of_returns_that_are_handed_over() -> None:
    model = agent(Delicate)
    monitor = CriticPlasticity("critic", every=20, states=128)
    diagnostics = learn(model, monitor, 18)
    assert diagnostics is not None
    states, returns = torch.randn(50, 4), torch.randn(50)
    monitor.returns(states, returns)
    with pytest.raises(ValueError, match="a return for each of at least two states, got 3 for 50"):
        monitor.returns(states, returns[:3])
    with pytest.raises(ValueError, match="module must be one of critic, got 'actor'"):
        monitor.returns(states, returns, module="actor")
    diagnostics.finish()
    assert "plasticity/explained_variance" not in diagnostics.history
    state = diagnostics.state_dict()
    again = CriticPlasticity("critic", every=20, states=128)
    resumed = learn(model, again, 2, state=state, begin=18)
    assert resumed is not None
    resumed.finish()
    model.eval()
    with torch.no_grad():
        left = returns - model["critic"](states)[:, 0]
    expected = 1 - np.var(left.numpy()) / np.var(returns.numpy())
    assert values(resumed.history, "explained_variance")["critic"] == pytest.approx(expected, rel=1e-4)


def test_a_network_that_cannot_learn_any_more_is_less_trainable() -> None:
    torch.manual_seed(0)
    critic, states = Modules().eval(), StoredStates(256)
    states.take((torch.randn(256, 4),), {}, rows=256)
    first = {name: p.detach().clone() for name, p in critic.named_parameters()}
    before = torch.get_rng_state()
    assert trainability(critic, first, states, steps=40) == 1.0  # the same weights learn the same
    with torch.no_grad():
        critic.body[2].bias -= 100.0  # all units of a layer are dead
    ratio = trainability(critic, first, states, steps=150)
    assert ratio is not None and ratio > 1.1
    assert trainability(critic, first, states, steps=150) == ratio
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in critic.parameters())
    assert torch.equal(critic.body[0].weight, first["body.0.weight"])


# -- without a trace


def everything(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [t.clone() for t in model.state_dict().values()]
    tensors += [t.clone() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    tensors += [torch.get_rng_state(), torch.as_tensor(np.random.get_state()[1].astype(np.int64))]  # type: ignore[index, union-attr]
    tensors += [torch.tensor(random.getstate()[1]), torch.tensor([m.training for m in model.modules()])]
    return tensors


def test_a_run_is_the_same_bit_for_bit_with_it_and_without() -> None:
    runs = []
    for monitor in (None, CriticPlasticity("critic", every=7, states=128, trainability=5)):
        random.seed(0)
        np.random.seed(0)
        model = agent(Delicate)
        optimizer = torch.optim.Adam(model["critic"].parameters(), lr=1e-2)
        diagnostics = learn(model, monitor, 50, optimizer=optimizer)  # dropout draws from the global generator
        if diagnostics is not None:
            diagnostics.finish()
            assert len(diagnostics.history["plasticity/fau"]) == 6
        runs.append(everything(model, optimizer))
        assert leftovers(model, optimizer) == NOTHING
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = agent()
    optimizer = torch.optim.Adam(model["critic"].parameters())
    diagnostics = Diagnostics(model, optimizer, terminal=False, monitors=[CriticPlasticity("critic")])
    with pytest.raises(ZeroDivisionError), diagnostics.step():
        raise ZeroDivisionError
    assert leftovers(model, optimizer) == NOTHING


def test_evaluation_is_not_looked_at() -> None:
    model = agent()
    optimizer = torch.optim.Adam(model["critic"].parameters())
    monitor = CriticPlasticity("critic")
    diagnostics = Diagnostics(model, optimizer, terminal=False, monitors=[monitor])
    model.eval()
    model["critic"](torch.zeros(8, 4))
    model.train()
    with torch.no_grad():
        model["critic"](torch.zeros(8, 4))
    diagnostics.finish()
    assert monitor.state_dict()["modules"]["critic"]["fixed"] == {}


def test_a_compiled_critic_gives_its_states_and_compiles_once() -> None:
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model = agent()
    model["critic"] = torch.compile(model["critic"], backend=backend)  # type: ignore[assignment]
    history = watched(model, CriticPlasticity("critic", every=20, states=128), steps=45)
    assert history["plasticity/fau_fresh"].steps.tolist() == [15, 19, 39]
    assert set(values(history, "fau")) == {"critic.body.0", "critic.body.2"}
    assert len(compiled) == 1
    torch._dynamo.reset()


# -- one run over several jobs


def test_a_resumed_run_measures_what_an_unbroken_one_does() -> None:
    def run(cut: int | None) -> tuple[History, ...]:
        model = agent(Delicate)
        optimizer = torch.optim.Adam(model["critic"].parameters(), lr=1e-2)
        settings: dict[str, Any] = {"every": 15, "states": 128, "trainability": 5}
        first = learn(model, CriticPlasticity("critic", **settings), cut or 70, optimizer=optimizer)
        assert first is not None
        if cut is None:
            first.finish()
            return (first.history,)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        first.finish()
        second = learn(
            model, CriticPlasticity("critic", **settings), 70 - cut, optimizer=optimizer, state=state, begin=cut
        )
        assert second is not None
        second.finish()
        return first.history, second.history

    (whole,) = run(None)
    for cut in (10, 37, 58):  # before the first look, while nothing is collected, while fresh states are
        parts = run(cut)
        for name in whole:
            if name.startswith("plasticity/"):
                steps = [s for part in parts if name in part for s in part[name].steps.tolist()]
                assert steps == whole[name].steps.tolist(), name
                rows = np.concatenate([part[name].values for part in parts if name in part])
                assert np.array_equal(rows, whole[name].values), name
    assert len(whole["plasticity/fau"]) == 4 and "plasticity/trainability" in whole


# -- bad input


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"module": []}, "module must name at least one module"),
        ({"gamma": 1.0}, "gamma must be at least 0 and below 1, got 1.0"),
        ({"reward_bound": 0.0, "gamma": 0.9}, "reward_bound must be finite and above 0, got 0.0"),
        ({"reward_bound": 1.0}, "gamma is missing"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"trainability": -1}, "trainability must be True, False or a number of steps, got -1"),
        ({"states": 1.5}, "states must be an integer of at least 1, got 1.5"),
        ({"probe": torch.tensor([[math.nan]])}, "states must be finite"),
        ({"probe": (torch.zeros(3, 1), torch.zeros(2, 1))}, r"the same states.*got \[3, 2\] states"),
        ({"probe": torch.zeros(0, 4)}, r"got \[0\] states"),
    ],
)
def test_wrong_arguments_are_told_at_once(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CriticPlasticity(**{"module": "critic", **wrong})


def test_a_probe_that_is_no_tensor_is_told() -> None:
    with pytest.raises(TypeError, match=r"a tensor \[states, \.\.\.\] or several, got str"):
        CriticPlasticity("critic", probe="states")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("critc", r"module='critc' matches no module that is being trained\. Did you mean 'critic'"),
        ("target", r"No optimizer owns any of its parameters: a target or an averaged copy\?"),
        ("critic.body.1", "matches no module that is being trained"),  # it has no parameters
    ],
)
def test_a_module_that_is_not_there_is_told_when_the_run_begins(module: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        learn(agent(), CriticPlasticity(module), 1)


def test_a_probe_of_the_wrong_shape_is_told_when_the_run_begins() -> None:
    with pytest.raises(ValueError, match=r"probe: critic does not take states of shape \(9, 5\)"):
        learn(agent(), CriticPlasticity("critic", probe=torch.zeros(9, 5)), 1)


def test_fewer_states_than_features_have_no_rank_and_too_few_have_no_units() -> None:
    history = watched(agent(), CriticPlasticity("critic", states=30), steps=30)
    found = {name for name in history if name.startswith("plasticity/")}
    assert found == {f"plasticity/{n}" for n in ("updates", "weight_norm_ratio", "q_max_abs", "q_mean", "fau_fresh")}
    wide = agent(lambda: Modules(width=200))
    history = watched(wide, CriticPlasticity("critic", states=128), steps=16)
    assert "plasticity/fau" in history
    assert not {"plasticity/srank_99", "plasticity/effective_rank", "plasticity/feature_rank"} & set(history)


def test_nan_is_told_as_nan() -> None:
    model = agent()
    optimizer = torch.optim.Adam(model["critic"].parameters())
    with torch.no_grad():
        model["critic"].body[2].weight[0, 0] = math.nan
    monitor = CriticPlasticity("critic", probe=torch.randn(128, 4))
    diagnostics = Diagnostics(model, optimizer, terminal=False, monitors=[monitor], default_monitors=False)
    for _ in range(16):
        with diagnostics.step():
            model["critic"](torch.randn(8, 4)).sum().backward()
            optimizer.step()
    diagnostics.finish()
    for metric in ("fau_pooled", "q_max_abs", "srank_99", "weight_norm_ratio"):
        assert all(math.isnan(v) for v in values(diagnostics.history, metric).values()), metric
    assert [a.kind for a in diagnostics.alerts] == ["nonfinite"]


def test_inputs_that_cannot_be_kept_switch_it_off_with_a_word() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Boxed(Modules):
        def forward(self, x: Any, box: Any = None) -> Tensor:
            return super().forward(x)

    model = agent(Boxed)
    optimizer = torch.optim.Adam(model["critic"].parameters())
    diagnostics = Diagnostics(model, optimizer, terminal=False, strict=True, monitors=[CriticPlasticity("critic")])

    def train() -> None:
        for _ in range(16):
            with diagnostics.step():
                model["critic"](torch.randn(8, 4), Box(torch.zeros(1))).sum().backward()
                optimizer.step()

    with pytest.raises(MonitorFault, match=r"critic: its inputs hold a Box, which cannot be kept; pass probe="):
        train()
