"""Optimizer signals against a float64 replay of each optimizer, seen through the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from traindiag.capture import optimizer_state
from traindiag.capture.optimizer_state import second_moment
from traindiag.engine.diagnostics import Diagnostics
from traindiag.functional.optimizer import rms_t_ceiling
from traindiag.monitors.sentinel import sentinels

Array = NDArray[np.float64]
STEPS = 6
SHAPES = {"matrix": (7, 5), "vector": (5,), "conv": (3, 2, 2, 2)}


class Pulled(nn.Module):
    """Parameters whose gradients are whatever the test wants: the loss is linear in them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, pulls: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * pulls[n].to(p.dtype)).sum() for n, p in self.named_parameters()]).sum()


def pulls(steps: int = STEPS, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    scales = [1.0, 0.3, 2.0, 0.1, 30.0, 1.0, 0.5, 4.0]
    return [
        {n: torch.randn(s, generator=generator) * scales[i % len(scales)] for n, s in shapes.items()}
        for i in range(steps)
    ]


def diagnose(model: nn.Module, optimizers: Any, **settings: Any) -> Diagnostics:
    settings = {"every_n_steps": 1, "strict": True, "terminal": False, "max_overhead": None, **settings}
    return Diagnostics(model, optimizers, **settings)


def watched_run(
    make: Callable[[Sequence[nn.Parameter]], Optimizer], steps: Sequence[dict[str, Tensor]]
) -> tuple[Diagnostics, Optimizer]:
    model = Pulled()
    optimizer = make(list(model.parameters()))
    diagnostics = diagnose(model, optimizer)
    for pull in steps:
        with diagnostics.step() as step:
            optimizer.zero_grad()
            step.loss(model(pull)).backward()
            step.gradients()
            optimizer.step()
    diagnostics.finish()
    return diagnostics, optimizer


def values(diagnostics: Diagnostics, signal: str) -> dict[str, Array]:
    """``{parameter: [steps]}``; NaN where not seen."""
    series = diagnostics.history[signal]
    found = np.where(series.seen, series.values, np.nan)
    return {str(c.coordinates[-1]): found[:, i].astype(np.float64) for i, c in enumerate(series.cells)}


# -- second moments, replayed in float64 by hand ----------------------------------------------------


def adam(beta2: float, gradients: Sequence[Array]) -> Iterator[Array]:
    total = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients, start=1):
        total += beta2 ** (-t) * (1 - beta2) * g**2  # unrolled, not as a running mean
        yield total * beta2**t / (1 - beta2**t)


def amsgrad(beta2: float, gradients: Sequence[Array]) -> Iterator[Array]:
    highest = np.zeros_like(gradients[0])
    for t, v in enumerate(adam(beta2, gradients), start=1):
        highest = np.maximum(highest, v * (1 - beta2**t))
        yield highest / (1 - beta2**t)


def rmsprop(alpha: float, gradients: Sequence[Array], centered: bool = False) -> Iterator[Array]:
    for t in range(1, len(gradients) + 1):
        weights = [(1 - alpha) * alpha ** (t - i) for i in range(1, t + 1)]
        mean = sum(w * g for w, g in zip(weights, gradients))
        square = sum(w * g**2 for w, g in zip(weights, gradients))
        yield square - (mean**2 if centered else 0.0)


def adafactor(gradients: Sequence[Array]) -> Iterator[Array]:
    shape = gradients[0].shape
    state: Any = None
    for t, g in enumerate(gradients, start=1):
        rate = t**-0.8
        if len(shape) == 1:
            state = g**2 if state is None else state + rate * (g**2 - state)
            yield state
            continue
        row, column = (g**2).mean(-1), (g**2).mean(-2)
        if state is not None:
            row, column = state[0] + rate * (row - state[0]), state[1] + rate * (column - state[1])
        state = row, column
        yield np.einsum("...i,...j->...ij", row, column) / row.mean(-1)[..., None, None]


def oracle(moments: Iterator[Array], gradients: Sequence[Array], eps: float) -> list[float]:
    return [math.sqrt(np.mean(g**2 / np.maximum(v, eps**2))) for g, v in zip(gradients, moments)]


MOMENTS: dict[str, tuple[Callable[[Any], Optimizer], Callable[[list[Array]], Iterator[Array]], float]] = {
    "adam": (lambda p: optim.Adam(p, lr=0.01), lambda g: adam(0.999, g), 1e-8),
    "adamw": (lambda p: optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.3), lambda g: adam(0.95, g), 1e-8),
    "single": (lambda p: optim.AdamW(p, lr=0.01, foreach=False), lambda g: adam(0.999, g), 1e-8),
    "foreach": (lambda p: optim.AdamW(p, lr=0.01, foreach=True), lambda g: adam(0.999, g), 1e-8),
    "fused": (lambda p: optim.AdamW(p, lr=0.01, fused=True), lambda g: adam(0.999, g), 1e-8),
    "amsgrad": (lambda p: optim.AdamW(p, betas=(0.9, 0.5), amsgrad=True), lambda g: amsgrad(0.5, g), 1e-8),
    "maximize": (lambda p: optim.Adam(p, lr=0.01, maximize=True), lambda g: adam(0.999, g), 1e-8),
    "large_eps": (lambda p: optim.Adam(p, lr=0.01, eps=0.7), lambda g: adam(0.999, g), 0.7),
    "no_memory": (lambda p: optim.Adam(p, lr=0.01, betas=(0.9, 0.0)), lambda g: iter([x**2 for x in g]), 1e-8),
    "nadam": (lambda p: optim.NAdam(p, lr=0.01), lambda g: adam(0.999, g), 1e-8),
    "radam": (lambda p: optim.RAdam(p, lr=0.01), lambda g: adam(0.999, g), 1e-8),
    "rmsprop": (lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5), lambda g: rmsprop(0.99, g), 1e-8),
    "centered": (lambda p: optim.RMSprop(p, alpha=0.9, centered=True), lambda g: rmsprop(0.9, g, True), 1e-8),
    "adadelta": (lambda p: optim.Adadelta(p), lambda g: (v + 1e-6 for v in rmsprop(0.9, g)), 1e-3),
    "adafactor": (lambda p: optim.Adafactor(p), adafactor, float(torch.finfo(torch.float32).eps)),
}


@pytest.mark.parametrize("variant", MOMENTS)
def test_rms_t_is_that_of_a_float64_replay(variant: str) -> None:
    make, moments, eps = MOMENTS[variant]
    steps = pulls()
    diagnostics, _ = watched_run(make, steps)
    found, over_eps = values(diagnostics, "optimizer/rms_t"), values(diagnostics, "optimizer/grad_rms_over_eps")
    for name in SHAPES:
        gradients = [s[name].double().numpy() for s in steps]
        # centered: the difference of two nearly equal float32 averages
        np.testing.assert_allclose(found[name], oracle(moments(gradients), gradients, eps), rtol=2e-3, err_msg=name)
        expected = [np.sqrt(np.mean(g**2)) / eps for g in gradients]
        np.testing.assert_allclose(over_eps[name], expected, rtol=1e-5, err_msg=name)


def test_rms_t_stays_below_its_ceiling_and_sees_a_jump() -> None:
    quiet = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(40)]
    jump = {n: 100 * torch.randn(s) for n, s in SHAPES.items()}
    diagnostics, _ = watched_run(lambda p: optim.AdamW(p, betas=(0.9, 0.99)), [*quiet, jump])
    for name, rms in values(diagnostics, "optimizer/rms_t").items():
        assert 0.5 < rms[30:40].mean() < 1.5 and 2.3 < rms[40] <= rms_t_ceiling(0.99), name
    every = values(diagnostics, "optimizer/sentinel_rms_t")
    np.testing.assert_allclose(every["matrix"], values(diagnostics, "optimizer/rms_t")["matrix"], rtol=1e-6)


ANY: dict[str, Callable[[Any], Optimizer]] = {
    **{name: make for name, (make, _, _) in MOMENTS.items()},
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "tensor_lr": lambda p: optim.AdamW(p, lr=torch.tensor(0.01)),
    "muon": lambda p: optim.Muon([x for x in p if x.dim() == 2], lr=0.1),
}
NO_MOMENT = ("sgd", "momentum", "adagrad", "adamax", "rprop", "muon")


@pytest.mark.parametrize("variant", ANY)
def test_updates_are_those_of_a_float64_twin(variant: str) -> None:
    """Muon computes in bfloat16 whatever it is given, so its twin runs in float32 like itself."""
    steps = pulls()
    diagnostics, _ = watched_run(ANY[variant], steps)
    twin = Pulled(dtype=torch.float32 if variant == "muon" else torch.float64)
    replay = ANY[variant](list(twin.parameters()))
    for group in replay.param_groups:  # the plain implementation, whatever was watched
        group.update({name: False for name in ("foreach", "fused") if name in group})
    owned = {id(p) for g in replay.param_groups for p in g["params"]}
    rms, relative, norm = (
        values(diagnostics, f"optimizer/{n}") for n in ("update_rms", "update_ratio", "parameter_norm")
    )
    for i, pull in enumerate(steps):
        before = {n: p.detach().clone() for n, p in twin.named_parameters() if id(p) in owned}
        replay.zero_grad()
        twin(pull).backward()
        replay.step()
        for name, parameter in twin.named_parameters():
            if name not in before:
                assert name not in rms
                continue
            change = (parameter.detach() - before[name]).double()
            size = float(before[name].double().norm())
            np.testing.assert_allclose(rms[name][i], float(change.square().mean().sqrt()), rtol=2e-3, err_msg=name)
            np.testing.assert_allclose(relative[name][i], float(change.norm()) / size, rtol=2e-3, err_msg=name)
            np.testing.assert_allclose(norm[name][i], size, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("variant", NO_MOMENT)
def test_no_second_moment_is_unseen_with_its_reason(variant: str) -> None:
    diagnostics, optimizer = watched_run(ANY[variant], pulls(2))
    for signal in ("rms_t", "grad_rms_over_eps", "sentinel_rms_t"):
        assert f"optimizer/{signal}" not in diagnostics.history
    assert "optimizer/update_rms" in diagnostics.history
    rows = [c for c in diagnostics.coverage if c.family == "optimizer" and c.sight == "unseen"]
    assert len(rows) == 1 and rows[0].places == (type(optimizer).__name__,)
    said = {"sgd": "no state", "momentum": "momentum_buffer", "muon": "momentum_buffer", "adamax": "exp_inf"}
    assert said.get(variant, "") in rows[0].reason


class GroupStep(Optimizer):
    """A third-party Adam that counts steps in the group, as apex does, and corrects no bias."""

    def __init__(self, params: Any, corrects: bool) -> None:
        super().__init__(
            params, {"lr": 0.01, "betas": (0.9, 0.9), "eps": 1e-8, "bias_correction": corrects, "step": 0}
        )

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                group["step"] += 1
                for p in group["params"]:
                    v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                    v.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                    p.add_(p.grad, alpha=-0.01)


@pytest.mark.parametrize("corrects", [True, False])
def test_third_party_optimizers_with_adams_names(corrects: bool) -> None:
    steps = pulls()
    diagnostics, _ = watched_run(lambda p: GroupStep(p, corrects), steps)
    gradients = [s["matrix"].double().numpy() for s in steps]
    moments = adam(0.9, gradients) if corrects else rmsprop(0.9, gradients)
    expected = oracle(moments, gradients, 1e-8)
    np.testing.assert_allclose(values(diagnostics, "optimizer/rms_t")["matrix"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("state", "group", "reason"),
    [
        ({}, {}, "no state"),
        ({"exp_avg_sq": torch.ones(2)}, {"eps": 1e-8}, "without betas"),
        ({"exp_avg_sq": torch.ones(2)}, {"eps": 1e-8, "betas": (0.9, 0.99)}, "without a step"),
        (
            {"exp_avg_sq": torch.ones(2, dtype=torch.uint8), "step": 1},
            {"eps": 1e-8, "betas": (0.9, 0.99)},
            "as Tensor",
        ),
        ({"exp_avg_sq": torch.ones(2, device="meta"), "step": 1}, {"eps": 0, "betas": (0, 0)}, "as Tensor"),
        ({"square_avg": torch.ones(2)}, {}, "unknown form"),
        ({"state1": torch.ones(2), "qmap1": 0}, {"eps": 1e-8, "betas": (0.9, 0.99)}, "qmap1, state1"),
    ],
)
def test_what_cannot_be_read_says_why(state: dict[str, Any], group: dict[str, Any], reason: str) -> None:
    found = second_moment(nn.Parameter(torch.ones(2)), state, group)
    assert isinstance(found, str) and reason in found


def test_steps_counted_on_the_device_are_not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pulls()
    expected, _ = watched_run(MOMENTS["adamw"][0], steps)
    monkeypatch.setattr(optimizer_state, "_on_host", lambda value: value)  # as if every tensor were on a device
    found, _ = watched_run(MOMENTS["adamw"][0], steps)
    for signal in ("optimizer/rms_t", "optimizer/sentinel_rms_t"):
        for name, series in values(expected, signal).items():
            np.testing.assert_allclose(values(found, signal)[name], series, rtol=2e-5)


def test_looking_leaves_no_trace_in_the_optimizers_state() -> None:
    model = Pulled()
    model.vector.requires_grad_(False)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer)
    with diagnostics.step() as step:
        step.loss(model(pulls(1)[0])).backward()
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    assert model.vector not in optimizer.state
    assert np.isnan(values(diagnostics, "optimizer/rms_t")["vector"]).all()


# -- samples ---------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=3), st.integers(0, 3))
def test_any_shape(shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))
    model.other = nn.Parameter(torch.randn(3))
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer)
    with diagnostics.step() as step:
        gradient = torch.randn(shape)
        before = model.weight.detach().clone()
        step.loss((model.weight * gradient).sum() + model.other.sum()).backward()
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    found = {n: values(diagnostics, f"optimizer/{n}")["weight"][0] for n in ("update_rms", "parameter_norm", "rms_t")}
    if not model.weight.numel():
        assert all(map(math.isnan, found.values()))  # nothing there is not zero
        return
    tolerance = 1e-4 if model.weight.numel() <= 4096 else 0.08
    change = (model.weight.detach() - before).double()
    np.testing.assert_allclose(found["update_rms"], change.square().mean().sqrt(), rtol=tolerance)
    np.testing.assert_allclose(found["parameter_norm"], before.double().norm(), rtol=tolerance)
    np.testing.assert_allclose(found["rms_t"], 1.0, rtol=1e-3)  # at the first step v is g^2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = Pulled(dtype=dtype)
    optimizer = optim.SGD(model.parameters(), lr=1e-12 if dtype is torch.float64 else 0.5)
    before = model.matrix.detach().double().clone()
    diagnostics = diagnose(model, optimizer)
    with diagnostics.step() as step:
        step.loss(model(pulls(1)[0])).backward()
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    change = (model.matrix.detach().double() - before).square().mean().sqrt()
    np.testing.assert_allclose(values(diagnostics, "optimizer/update_rms")["matrix"][0], change, rtol=1e-3)


def test_a_weight_of_zero_has_no_ratio_and_nan_is_a_result() -> None:
    model = Pulled()
    with torch.no_grad():
        model.vector.zero_()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    for pull in pulls(2):
        pull["matrix"][0, 0] = torch.nan
        with diagnostics.step() as step:
            optimizer.zero_grad()
            step.loss(model(pull)).backward()
            step.gradients()
            optimizer.step()
    diagnostics.finish()
    ratio = diagnostics.history["optimizer/update_ratio"]
    seen = dict(zip([str(c.coordinates[1]) for c in ratio.cells], ratio.seen.T.tolist()))
    assert seen == {"matrix": [True, True], "vector": [False, True], "conv": [True, True]}
    for signal in ("rms_t", "update_rms", "update_ratio", "grad_rms_over_eps", "sentinel_rms_t"):
        series = diagnostics.history[f"optimizer/{signal}"]
        at = next(i for i, c in enumerate(series.cells) if c.coordinates[1] == "matrix")
        assert series.seen[:, at].all() and np.isnan(series.values[1, at]), signal
    assert np.isfinite(values(diagnostics, "optimizer/update_rms")["conv"]).all()


# -- ways to train ----------------------------------------------------------------------------------


def test_sparse_gradients_show_updates_and_nothing_of_gradients() -> None:
    model = nn.Embedding(50, 4, sparse=True)
    optimizer = optim.SparseAdam(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer)
    before = model.weight.detach().clone()
    with diagnostics.step() as step:
        step.loss(model(torch.tensor([3, 7])).sum()).backward()
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    change = (model.weight.detach() - before).square().mean().sqrt()
    np.testing.assert_allclose(values(diagnostics, "optimizer/update_rms")["weight"][0], change, rtol=1e-5)
    for signal in ("optimizer/rms_t", "optimizer/sentinel_rms_t", "gradient/zero_fraction", "wiring/unchanged"):
        assert signal not in diagnostics.history
    assert values(diagnostics, "wiring/ungraded")["weight"][0] == 0


def test_tied_weights_are_one_parameter() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 3), "head": nn.Linear(3, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer)
    with diagnostics.step() as step:
        step.loss(model["head"](model["embed"](torch.arange(6))).square().sum()).backward()
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    assert list(values(diagnostics, "optimizer/update_rms")) == ["embed.weight"]
    assert values(diagnostics, "wiring/owners")["embed.weight"][0] == 1


def test_several_updates_of_a_step_are_their_root_mean_square() -> None:
    model = Pulled()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer)
    changes, norms = [], []
    with diagnostics.step() as step:
        for pull in pulls(3):
            optimizer.zero_grad()
            model(pull).backward()
            step.gradients()
            norms.append(float(model.matrix.detach().norm()))
            changes.append(0.1 * pull["matrix"].double())
            optimizer.step()
    diagnostics.finish()
    expected = torch.stack(changes).square().mean().sqrt()
    np.testing.assert_allclose(values(diagnostics, "optimizer/update_rms")["matrix"][0], expected, rtol=1e-5)
    norm = math.sqrt(np.mean(np.square(norms)))
    np.testing.assert_allclose(values(diagnostics, "optimizer/parameter_norm")["matrix"][0], norm, rtol=1e-5)


def test_optimizers_are_kept_apart_and_only_those_that_step_are_seen() -> None:
    model = Pulled()
    first, second = optim.AdamW([model.matrix, model.conv], lr=0.01), optim.SGD([model.vector], lr=0.5)
    diagnostics = diagnose(model, {"body": first, "head": second})
    for i, pull in enumerate(pulls(4)):
        with diagnostics.step() as step:
            model(pull).backward()
            for name, optimizer in (("body", first), ("head", second)):
                if name == "body" or i % 2 == 0:
                    step.gradients(name)
                    optimizer.step()
                optimizer.zero_grad()
    diagnostics.finish()
    series = diagnostics.history["optimizer/update_rms"]
    owners = {str(c.coordinates[1]): str(c.coordinates[0]) for c in series.cells}
    assert owners == {"matrix": "body", "conv": "body", "vector": "head"}
    assert np.isnan(values(diagnostics, "optimizer/update_rms")["vector"]).tolist() == [False, True, False, True]
    assert not np.isnan(values(diagnostics, "optimizer/update_rms")["matrix"]).any()
    skipped = diagnostics.history["optimizer/skipped"]
    assert (skipped.values[skipped.seen] == 0).all() and skipped.seen.sum() == 6


def test_attached_to_a_loop_it_sees_the_same_updates() -> None:
    steps = pulls()
    expected, _ = watched_run(MOMENTS["adamw"][0], steps)
    model = Pulled()
    optimizer = MOMENTS["adamw"][0](model.parameters())
    diagnostics = Diagnostics.attach(
        model, optimizer, every_n_steps=1, strict=True, terminal=False, max_overhead=None
    )
    for pull in steps:
        optimizer.zero_grad()
        model(pull).backward()
        optimizer.step()
    diagnostics.detach()
    for signal in ("optimizer/rms_t", "optimizer/update_rms", "gradient/zero_fraction"):
        for name, series in values(expected, signal).items():
            np.testing.assert_array_equal(values(diagnostics, signal)[name], series, signal)
    assert "gradient/rms" not in diagnostics.history and "gradient/clip_rate" not in diagnostics.history


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_loss_scaler_skips(fused: bool) -> None:
    model = Pulled()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    steps, bad = pulls(), 3
    steps[bad]["conv"][0] = torch.inf
    for pull in steps:
        with diagnostics.step() as step:
            optimizer.zero_grad()
            scaler.scale(step.loss(model(pull))).backward()
            if fused:
                step.gradients(scale=scaler.get_scale())
            else:
                scaler.unscale_(optimizer)
                step.gradients()
            scaler.step(optimizer)
            scaler.update()
    diagnostics.finish()
    skipped = diagnostics.history["optimizer/skipped"]
    assert skipped.steps.tolist() == list(range(STEPS))
    assert skipped.values[:, 0].tolist() == [float(i == bad) for i in range(STEPS)]
    good = [s["matrix"].double().numpy() for i, s in enumerate(steps) if i != bad]
    expected = oracle(adam(0.999, good), good, 1e-8)
    for signal in ("optimizer/rms_t", "optimizer/sentinel_rms_t"):
        series = diagnostics.history[signal]
        at = next(i for i, c in enumerate(series.cells) if c.coordinates[1] == "matrix")
        seen = series.seen[:, at]
        assert series.steps[seen].tolist() == [i for i in range(STEPS) if i != bad], signal
        np.testing.assert_allclose(series.values[seen, at], expected, rtol=1e-4)
    changed = diagnostics.history["wiring/unchanged"]
    assert (changed.values[changed.seen] == 0).all()  # a skipped step is not a stuck tensor


# -- sentinels --------------------------------------------------------------------------------------


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in sentinels(list(model.named_parameters()), dict(model.named_modules()))]


def test_sentinels_of_usual_models() -> None:
    from traindiag.demo.model import GPT, GPTConfig

    gpt = GPT(GPTConfig(layers=3, width=8, heads=2, context=8))
    first = ["token_embedding.weight", "blocks.0.attention.query_key_value.weight"]
    assert names(gpt) == [*first, "blocks.2.attention.query_key_value.weight"]
    assert names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))) == ["0.weight", "2.weight"]
    assert names(nn.Linear(2, 3)) == ["weight"] and names(nn.LayerNorm(3)) == []
    vision = nn.ModuleDict(
        {"patch_embed": nn.Conv2d(3, 4, 2), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in "ab")}
    )
    vision.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    assert names(vision) == ["patch_embed.weight", "layers.0.weight", "layers.1.weight"]
    vision["patch_embed"].requires_grad_(False)
    assert names(vision) == ["layers.0.weight", "layers.1.weight"]
