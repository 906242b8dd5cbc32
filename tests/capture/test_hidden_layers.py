"""Hidden layers are found however their activation is spelled, under the names that their users know."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.capture.hidden_layers import look_inside, tensors_of, value_heads

INF = math.inf
RELU, TANH, SIGMOID = (0.0, INF), (-2.6441, 2.6441), (-5.2882, 5.2882)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def names_of(module: nn.Module, prefix: str = "critic") -> dict[nn.Module, str]:
    return {m: f"{prefix}.{n}" if n else prefix for n, m in module.named_modules()}


@pytest.mark.parametrize(
    ("function", "name", "active"),
    [
        (F.relu, "relu", RELU),
        (torch.relu, "relu", RELU),
        (lambda x: x.relu(), "relu", RELU),
        (lambda x: x.relu_(), "relu", RELU),
        (lambda x: F.relu(x, inplace=True), "relu", RELU),
        (lambda x: F.relu_(x), "relu", RELU),
        (nn.ReLU(inplace=True), "relu", RELU),
        (lambda x: x.clamp(min=0), "relu", RELU),
        (lambda x: torch.clamp(x, 0.0), "relu", RELU),
        (lambda x: x.clamp_min(0), "relu", RELU),
        (nn.ReLU6(), "relu6", (0.0, 6.0)),
        (nn.LeakyReLU(), "leaky_relu", RELU),
        (nn.PReLU(), "prelu", RELU),
        (torch.tanh, "tanh", TANH),
        (lambda x: x.tanh(), "tanh", TANH),
        (nn.Tanh(), "tanh", TANH),
        (lambda x: x.sigmoid_(), "sigmoid", SIGMOID),
        (F.sigmoid, "sigmoid", SIGMOID),
        (nn.GELU(approximate="tanh"), "gelu", (-2.7392, INF)),
        (F.silu, "silu", (-5.2528, INF)),
        (nn.Mish(), "mish", (-5.2740, INF)),
        (nn.ELU(alpha=2.0), "elu", (math.log(0.02), INF)),
        (lambda x: F.elu(x, 0.5), "elu", (math.log(0.04), INF)),
        (nn.CELU(alpha=2.0), "celu", (2 * math.log(0.02), INF)),
        (nn.SELU(), "selu", (-3.9120, INF)),
        (nn.Softplus(beta=2.0), "softplus", (-3.8918 / 2, INF)),
        (nn.LogSigmoid(), "logsigmoid", (-INF, 3.8918)),
        (nn.Softsign(), "softsign", (-6.0711, 6.0711)),
        (nn.Hardtanh(-2.0, 3.0), "hardtanh", (-2.0, 3.0)),
        (nn.Hardsigmoid(), "hardsigmoid", (-3.0, 3.0)),
        (nn.Hardswish(), "hardswish", (-3.0, INF)),
    ],
)
@torch.no_grad()
def test_every_spelling(function: Callable[[Tensor], Tensor], name: str, active: tuple[float, float]) -> None:
    module, x = Calls(function).eval(), torch.randn(5, 3)
    (layer,) = look_inside(module, (x,), {}, 5, names_of(module)).layers
    assert (layer.name, layer.activation) == ("critic.linear", name)
    assert layer.active == pytest.approx(active)
    assert torch.equal(layer.before, module.linear(x))  # as it was before a function in place
    assert torch.equal(layer.after, module(x))


@pytest.mark.parametrize("function", [torch.exp, lambda x: x.clamp(min=1), lambda x: x.clamp(0, 1), nn.Identity()])
@torch.no_grad()
def test_what_is_no_activation_function(function: Callable[[Tensor], Tensor]) -> None:
    module = Calls(function)
    assert look_inside(module, (torch.randn(5, 3),), {}, 5, names_of(module)).layers == []


class Branches(nn.Module):
    """Two heads behind a trunk, a skip, a norm, a layer called twice, and an output that is squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(3, 8), nn.LayerNorm(8)
        self.value, self.policy, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.norm(self.trunk(x)))
        h = F.relu(self.value(h) + h)
        p = F.relu(self.policy(h))
        p = F.relu(self.policy(p))
        return h.sum(1, keepdim=True), torch.tanh(self.out(p))


@torch.no_grad()
def test_names_and_which_layers_are_last() -> None:
    module = Branches()
    seen = look_inside(module, (torch.randn(5, 3),), {}, 5, names_of(module))
    assert [x.name for x in seen.layers] == [
        "critic.norm", "critic.relu", "critic.policy", "critic.policy call 2", "critic.out",
    ]  # fmt: skip
    assert seen.last == {"critic.relu", "critic.policy call 2"} and seen.squashed == {"critic.out"}


@torch.no_grad()
def test_feature_maps_and_members_are_units() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    (layer,) = look_inside(conv, (torch.randn(5, 1, 6, 7),), {}, 5, names_of(conv)).layers
    assert layer.before.shape == (5, 4, 5, 4)

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.einsum("nd,mdk->mnk", x, self.weight))

    ensemble, x = Ensemble(), torch.randn(5, 4)
    (layer,) = look_inside(ensemble, (x,), {}, 5, names_of(ensemble)).layers
    assert layer.before.shape == (5, 18)
    assert torch.equal(layer.after[:, 6:12], ensemble(x)[1])
    assert [h.shape for h in value_heads(ensemble(x), 5)] == [(5, 6)] * 3


@torch.no_grad()
def test_nothing_is_left_and_members_of_vmap_are_left_alone() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda w: F.relu(x @ w))(self.weight)

    module = Mapped()
    assert look_inside(module, (torch.randn(5, 4),), {}, 5, names_of(module)).layers == []
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    with pytest.raises(RuntimeError):
        look_inside(net, (torch.randn(5, 9),), {}, 5, names_of(net))
    assert not any(m._forward_hooks for m in net.modules())


def test_tensors_of_nested_structures() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert [t is x for t, x in zip(tensors_of({"q": (a, [b, None, "x"])}), (a, b))] == [True, True]
