"""A rehearsal tells what is wrong before the run begins, and leaves nothing behind."""

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

from traindiag import preflight
from traindiag.demo.model import GPT, GPTConfig
from traindiag.panels.preflight import print_preflight
from traindiag.record.preflight import Preflight


class Noisy(nn.Module):
    """Batch norm, dropout, a counter, and a buffer that is replaced: all that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        )
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        self.calls += 1
        self.cached = x
        random.random(), np.random.rand()
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        return self.last(self.drop(self.norm(self.first(x)).relu()))


def batch(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "asks": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "names": [sorted(vars(m)) for m in model.modules()],
        "calls": getattr(model, "calls", None),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "optimizer names": sorted(vars(optimizer)),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained(steps: int) -> tuple[Noisy, torch.optim.Optimizer]:
    """A model in the middle of a run, gradients and optimizer state included."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(steps: int, training: bool) -> None:
    model, optimizer = trained(steps)
    model.train(training)
    before = everything(model, optimizer)
    state = {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    result = preflight(model, batch(), optimizer, show=False)
    after = everything(model, optimizer)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert {p: {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()} == state  # the same objects
    assert result.history["optimizer/update_rms"].values.max() > 0  # it did train


@pytest.mark.parametrize("call", [1, 2, 5])
def test_nothing_is_left_behind_by_a_forward_pass_that_raises(call: int) -> None:
    model, optimizer = trained(2)
    model.fails_at = model.calls + call
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"Noisy could not be called.*out of luck"):
        preflight(model, batch(), optimizer, show=False)
    after = everything(model, optimizer)
    assert [name for name in before if not same(before[name], after[name])] == []


def test_a_run_goes_on_as_if_there_had_been_no_rehearsal() -> None:
    results = []
    for rehearse in (False, True):
        model, optimizer = trained(2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
        if rehearse:
            assert any(
                "learning rate of 0" in f.text for f in preflight(model, batch(), optimizer, show=False).findings
            )
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            optimizer.step()
            scheduler.step()
        results.append(everything(model, optimizer))
    assert [name for name in results[0] if not same(results[0][name], results[1][name])] == []


def gpt(layers: int = 3) -> tuple[GPT, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (4, 33))
    return GPT(GPTConfig(layers=layers, width=32, vocabulary=64)), (tokens[:, :-1], tokens[:, 1:])


def rehearsed(model: nn.Module, data: Any, optimizer: Any = None, **keywords: Any) -> Preflight:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    return preflight(model, data, optimizer, show=False, **keywords)


def test_a_sound_model() -> None:
    model, data = gpt()
    result = rehearsed(model, data)
    assert result.ok
    assert result.findings == ()
    assert result.classes == 64
    with torch.no_grad():
        assert result.loss == F.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten()).item()
    assert {"attention", "output", "gradient", "activation", "optimizer", "wiring"} <= {
        r.family for r in result.coverage
    }
    assert result.cost is not None
    assert 0 < result.cost.idle < result.cost.sampled
    assert result.cost.idle < result.cost.share < result.cost.sampled


def test_growth_exponents_against_autograd() -> None:
    model, data = gpt(layers=4)
    sizes = []
    x = model.token_embedding(data[0]) + model.position_embedding(torch.arange(32))
    for block in model.blocks:
        x = block(x)
        x.retain_grad()
        sizes.append(x)
    F.cross_entropy(model.head(model.final_norm(x)).flatten(0, 1), data[1].flatten()).backward()
    model.zero_grad()
    ends = [(t.detach().double().norm(), t.grad.double().norm()) for t in (sizes[0], sizes[-1])]
    result = rehearsed(model, data)
    assert result.activation_growth["blocks"] == pytest.approx(math.log(ends[1][0] / ends[0][0]) / 4, rel=1e-4)
    assert result.gradient_growth["blocks"] == pytest.approx(math.log(ends[0][1] / ends[1][1]) / 4, rel=1e-4)


def test_a_steep_model_and_a_large_head_are_told() -> None:
    model, data = gpt(layers=8)
    with torch.no_grad():
        model.head.weight *= 6
        for i, block in enumerate(model.blocks):
            block.mlp[2].weight *= 1.8**i
    told = [f.text for f in rehearsed(model, data).findings]
    assert any(
        t.startswith("the loss starts at") and "log(64 classes) = 4.16: the head starts too large" in t for t in told
    )
    assert any(t.startswith("activations grow") for t in told)


def forget(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for n, p in model.named_parameters() if n != "blocks.1.mlp.2.weight"])


def detach(model: GPT) -> torch.optim.Optimizer:
    layer = model.blocks[1].mlp[2]
    layer.forward = lambda x: F.linear(x, layer.weight.detach())
    return torch.optim.AdamW(model.parameters())


def stop(model: GPT) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    lame = named.pop("blocks.1.mlp.2.weight")
    return torch.optim.AdamW([{"params": list(named.values())}, {"params": [lame], "lr": 0.0}])


def share(model: GPT) -> dict[str, torch.optim.Optimizer]:
    return {"a": torch.optim.AdamW(model.parameters()), "b": torch.optim.SGD([model.blocks[1].mlp[2].weight], lr=0.1)}


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (forget, "not in exactly one"),
        (share, "not in exactly one"),
        (detach, "gets no grad"),
        (stop, "does not change"),
    ],
)
def test_faults(break_it: Callable[[GPT], Any], words: str) -> None:
    model, data = gpt()
    result = rehearsed(model, data, break_it(model))
    assert not result.ok
    faults = [f.text for f in result.findings if f.severity == "warning"]
    assert len(faults) == 1
    assert faults[0].startswith("blocks.1.mlp.2.weight ")
    assert words in faults[0]


def test_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (2, 16))
    result = rehearsed(model, {"input_ids": tokens, "labels": tokens})
    assert result.ok
    assert result.classes == 64
    assert [f.text[:32] for f in result.findings] == ["the model is in evaluation mode:"]


def test_a_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)
            self.needs_trainer = False

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss / self.trainer.world_size if self.needs_trainer else loss

    model = Net()
    assert rehearsed(model, batch()).classes == 3
    model.needs_trainer = True
    with pytest.raises(ValueError, match=r"failed without a trainer.*pass loss="):
        rehearsed(model, batch())
    assert rehearsed(model, batch(), loss=lambda m, b: F.cross_entropy(m.net(b[0]), b[1])).ok


@pytest.mark.parametrize(
    ("data", "keywords", "message"),
    [
        ((torch.ones(4, 5), torch.zeros(4).long()), {}, r"with this batch \(a tuple of float32 \(4, 5\)"),
        (batch()[0], {}, r"no loss in what Noisy returned.*pass loss="),
        ((batch()[0], torch.rand(12, 3)), {}, r"no loss in what Noisy returned"),
        (batch(), {"loss": lambda m, b: m(b[0])}, r"one value, got shape \(12, 3\); pass loss="),
        (batch(), {"loss": lambda m, b: 3.0}, r"one value, got float"),
        (batch(), {"loss": lambda m, b: m(b[0]).sum().detach()}, r"does not depend on any parameter"),
        ((batch()[0] * math.nan, batch()[1]), {}, r"the loss of this batch is nan"),
        (batch(), {"steps": 0}, r"steps must be an integer of at least 1, got 0"),
        (batch(), {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, r"2 tensors and none of the 6"),
        (batch(), {"optimizer": torch.optim.LBFGS(nn.Linear(2, 2).parameters())}, r"LBFGS"),
        (batch(), {"optimizer": 3e-4}, r"optimizer must be a torch.optim.Optimizer, got float"),
    ],
)  # fmt: skip
def test_clear_messages(data: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearsed(Noisy(), data, **keywords)


def test_it_is_plain_text_of_at_most_100_columns_without_a_terminal() -> None:
    model, data = gpt()
    result, stream = rehearsed(model, data, forget(model)), io.StringIO()
    print_preflight(result, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("traindiag preflight  1 fault; loss ")
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in stream.getvalue()
    assert any(line.split()[:1] == ["gradient/norm"] for line in lines)
