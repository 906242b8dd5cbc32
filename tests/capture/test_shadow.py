"""A look into compiled code by a second, eager pass: it sees what an eager run shows and changes nothing."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from traindiag import Diagnostics
from traindiag.capture.coverage import SHADOW
from traindiag.capture.sandbox import sandbox
from traindiag.capture.shadow import ROWS
from traindiag.demo.model import GPT, GPTConfig, next_token_loss


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    gc.collect()
    torch._dynamo.reset()
    counters.clear()


class Noisy(nn.Module):
    """Draws random numbers, and keeps a running mean, in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GPT(GPTConfig(layers=2, width=32, heads=2, context=16))
        self.norm = nn.BatchNorm1d(256)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.dropout(self.net(tokens), 0.2, self.training)
        return self.norm(logits.flatten(0, 1)).view_as(logits)


def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)  # type: ignore[return-value]


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def blocks(model: nn.Module, backend: str) -> nn.Module:
    for i, block in enumerate(model.net.blocks):
        model.net.blocks[i] = torch.compile(block, backend=backend)
    return model


def train(
    how: Callable[[nn.Module, str], nn.Module] | None, watched: bool, backend: str = "aot_eager", steps: int = 4
) -> tuple[list[Tensor], Diagnostics | None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bare = Noisy()
    model = bare if how is None else how(bare, backend)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-2)
    options: dict[str, Any] = {"every_n_steps": 2, "max_overhead": None, "terminal": False, "strict": True}
    diagnostics = Diagnostics(model, optimizer, **options) if watched else None
    left = []
    for _ in range(steps):
        batch = torch.randint(256, (5, 16))
        if diagnostics is not None:
            diagnostics.begin()
        loss = next_token_loss(model(batch), batch)[0]
        if diagnostics is not None:
            diagnostics.before_backward()
        loss.backward()
        if diagnostics is not None:
            diagnostics.after_backward()
            diagnostics.gradients()
        optimizer.step()
        optimizer.zero_grad()
        if diagnostics is not None:
            diagnostics.end()
        left.append(loss.detach())
    if diagnostics is not None:
        diagnostics.finish()
    left += [*bare.parameters(), *bare.buffers(), torch.get_rng_state()]
    return [x.detach().clone() for x in left], diagnostics


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("how", [whole, in_place, blocks])
def test_not_a_bit_and_not_a_graph_more(how: Any) -> None:
    plain, _ = train(how, watched=False)
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    seen, diagnostics = train(how, watched=True)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert all(a.equal(b) for a, b in zip(plain, seen))
    assert diagnostics is not None
    for signal in ("attention/max_logit", "activation/rms"):
        assert diagnostics.history[signal].steps.tolist() == [0, 2], signal
    assert [str(c) for c in diagnostics.history["activation/rms"].cells] == ["net.blocks.0", "net.blocks.1"]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inductor_is_left_alone_too() -> None:
    plain, _ = train(whole, watched=False, backend="inductor", steps=3)
    torch._dynamo.reset()
    seen, _ = train(whole, watched=True, backend="inductor", steps=3)
    assert all(a.equal(b) for a, b in zip(plain, seen))


def test_it_sees_what_an_eager_run_of_these_rows_shows() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, heads=2, context=16))
    batch = torch.randint(256, (5, 16))

    def first_readings(model: nn.Module, rows: Tensor) -> dict[str, np.ndarray]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        diagnostics = Diagnostics(model, optimizer, terminal=False, strict=True, exact=True)
        with diagnostics.step() as step:
            step.loss(next_token_loss(model(rows), rows)[0]).backward()
            optimizer.step()
        diagnostics.finish()
        names = ("attention/max_logit", "attention/logit_range", "attention/query_norm", "activation/rms")
        return {name: diagnostics.history[name].values[0] for name in names}

    expected = first_readings(model, batch[:ROWS])
    found = first_readings(torch.compile(model, backend="aot_eager"), batch)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


class Own(nn.Module):
    """A loss inside of its forward pass, as Hugging Face's models have one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GPT(GPTConfig(layers=1, width=32, heads=2, context=16))
        self.calls = 0

    def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
        return next_token_loss(self.net(tokens), tokens)[0]


def coverage_after_one_step(model: nn.Module, *args: Any) -> dict[str, str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, terminal=False)
    with diagnostics.step() as step:
        step.loss(model(*args)).backward()
        optimizer.step()
    diagnostics.finish()
    assert diagnostics.history["loss/value"].steps.tolist() == [0]  # the run went on
    return {f"{row.family} {row.sight}": row.reason for row in diagnostics.coverage}


def test_a_loss_inside_of_compiled_code_is_seen() -> None:
    told = coverage_after_one_step(torch.compile(Own(), backend="aot_eager"), torch.randint(256, (3, 16)))
    assert "output exact" in told and told["attention bound"] == SHADOW


def test_arguments_that_a_second_pass_might_change_are_refused() -> None:
    class Cache:
        pass

    told = coverage_after_one_step(torch.compile(Own(), backend="aot_eager"), torch.randint(256, (3, 16)), Cache())
    reason = (
        "compiled, and a second, eager pass failed: TypeError: a second pass might change its argument of type Cache"
    )
    assert told["attention unseen"] == reason


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    class Whole(Own):
        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens.view(5, 16))

    told = coverage_after_one_step(torch.compile(Whole(), backend="aot_eager"), torch.randint(256, (5 * 16,)))
    assert told["attention bound"] == SHADOW


def test_the_sandbox_leaves_no_trace() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = [b.clone() for b in net.buffers()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with suppress(ZeroDivisionError), sandbox([net]):
        net(torch.randn(4, 3))
        random.random()
        np.random.rand()
        net.eval()
        assert not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert all(a.equal(b) for a, b in zip(before, net.buffers()))
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()


def test_buffers_that_nobody_wrote_to_stay_as_autograd_saved_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((3,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    net, x = Scaled(), torch.ones(3, requires_grad=True)
    loss = net(x).sum()  # its backward pass will read the buffer
    with sandbox([net]):
        net(x)
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
