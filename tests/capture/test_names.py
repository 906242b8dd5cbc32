"""Names are the user's: wrappers vanish, attributes that only look like wrappers stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW

from traindiag.capture.names import named_modules, watch


class Net(nn.Module):
    """Has a child called ``module`` and a teacher that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.head = nn.Linear(2, 2)
        self.teacher = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.head.weight = self.module[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(x))


def trained(net: Net) -> list[nn.Parameter]:
    return [*net.module.parameters(), net.head.bias]


def test_what_trains_is_watched_and_tied_parameters_count_once() -> None:
    net = Net()
    optimizer = AdamW(trained(net)[::-1])
    watched = watch(net, optimizer)
    assert list(watched.modules) == ["Net", "module", "module.0", "module.1", "head"]
    assert [n for n, _ in watched.parameters["AdamW"]] == ["module.0.weight", "module.0.bias", "head.bias"]
    assert list(watched.frozen) == ["teacher.0.weight", "teacher.0.bias"]
    assert watched.optimizers == {"AdamW": optimizer}
    assert watched.roots == (net,)


@pytest.mark.parametrize("wrap", ["compile", "data parallel", "checkpoint", "both"])
def test_wrappers_are_stripped_by_type(wrap: str) -> None:
    net = Net()
    parameters = trained(net)
    root: nn.Module = net
    if wrap in ("checkpoint", "both"):
        net.module = checkpoint_wrapper(net.module)
    if wrap in ("compile", "both"):
        net.head = torch.compile(net.head, backend="eager")  # type: ignore[assignment]
        root = torch.compile(net, backend="eager")  # type: ignore[assignment]
    if wrap in ("data parallel", "both"):
        root = nn.DataParallel(root)
    watched = watch(root, SGD(parameters))
    assert list(watched.modules) == ["Net", "module", "module.0", "module.1", "head"]
    assert [n for n, _ in watched.parameters["SGD"]] == ["module.0.weight", "module.0.bias", "head.bias"]
    assert watched.modules["Net"] is net


def test_adapters_are_stripped() -> None:
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 4))
            self.config = {"model_type": "custom"}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["0"]))
    watched = watch(model, SGD([p for p in model.parameters() if p.requires_grad]))
    names = [n for n, _ in watched.parameters["SGD"]]
    assert names == ["model.0.lora_A.default.weight", "model.0.lora_B.default.weight"]
    assert "model.0" in watched.modules


def test_flat_parameters_outside_the_model_get_a_name() -> None:
    net = Net()
    flat = nn.Parameter(torch.zeros(9))
    watched = watch(net, AdamW([{"params": [net.head.bias]}, {"params": [flat]}]))
    assert [n for n, _ in watched.parameters["AdamW"]] == ["head.bias", "AdamW.param_groups[1][0]"]
    only_flat = watch(net, AdamW([flat]))
    assert [n for n, _ in only_flat.parameters["AdamW"]] == ["AdamW.param_groups[0][0]"]
    assert "teacher.0" in only_flat.modules, "all that asks for a gradient is taken as trained"


def test_optimizers_and_several_models() -> None:
    actor, critic = nn.Linear(1, 1), nn.Linear(1, 1)
    a, b = AdamW(actor.parameters()), AdamW(critic.parameters())
    assert list(watch(actor, [a]).optimizers) == ["AdamW"]
    assert list(watch(actor, [a, b, SGD(actor.parameters())]).optimizers) == ["AdamW[0]", "AdamW[1]", "SGD"]
    watched = watch({"actor": actor, "critic": critic}, {"policy": a, "value": b})
    assert [n for n, _ in watched.parameters["value"]] == ["critic.weight", "critic.bias"]
    assert list(watched.modules) == ["actor", "critic"]


def test_patterns_select_subtrees() -> None:
    net = Net()
    optimizer = SGD(trained(net))
    assert list(watch(net, optimizer, "module").modules) == ["module", "module.0", "module.1"]
    assert list(watch(net, optimizer, ["*.1", "head"]).modules) == ["module.1", "head"]
    with pytest.raises(ValueError, match=r"watch='modul' matches no module .* Did you mean 'module'"):
        watch(net, optimizer, "modul")
    with pytest.raises(ValueError, match="matches no module"):
        watch(net, optimizer, "teacher*")


def test_order_and_wrapper_names() -> None:
    net = nn.DataParallel(Net())
    assert [name for name, _, _ in named_modules(net)][:4] == ["", "", "module", "module.0"]
