"""Compiled parts are left as they are: not a graph more, and what is in them is seen in a second pass."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.capture.test_attention_styles import GPT, NAMES, Attention, tokens
from tests.capture.test_window import capture, installed
from traindiag.capture.coverage import SHADOW


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    gc.collect()
    torch._dynamo.reset()
    counters.clear()


def compile_whole(model: GPT) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def compile_in_place(model: GPT) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compile_blocks(model: GPT) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
    return model


def compile_method(model: GPT) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


@pytest.mark.parametrize("first_sample", [0, 2])
@pytest.mark.parametrize("how", [compile_whole, compile_in_place, compile_blocks, compile_method])
def test_no_graph_is_added(how: Any, first_sample: int) -> None:
    model, seen = how(GPT()), []
    window = capture(model, seen)
    for step in range(4):
        if step >= first_sample:
            window.open()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loss = model(tokens())
        assert not [w for w in warned if "hooks" in str(w.message)]
        window.pause()
        loss.backward()
        window.close()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert installed() == (0, 0, 0)
    inside = NAMES[1:] if how is compile_blocks else NAMES
    assert {c.reason: c.places for c in window.coverage()}[SHADOW] == tuple(inside)
    assert not [c for c in window.coverage() if c.sight == "unseen"]
    assert seen == NAMES * (4 - first_sample)


@pytest.mark.parametrize("first_sample", [0, 2])
def test_a_wrapper_made_outside_is_found(first_sample: int) -> None:
    model, seen = GPT(), []
    window = capture(model, seen)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(4):
        if step >= first_sample:
            window.open()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            compiled(tokens())
        window.close()
        assert not [w for w in warned if "hooks" in str(w.message)]
    assert counters["stats"]["unique_graphs"] == 1
    assert seen == NAMES * (4 - first_sample)
    assert {c.reason: c.places for c in window.coverage()} == {SHADOW: tuple(NAMES)}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eager, self.fast = GPT(), torch.compile(GPT(), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.eager(x) + self.fast(x)


def test_eager_parts_beside_compiled_ones_are_seen() -> None:
    model, seen = Two(), []
    window = capture(model, seen)
    for _ in range(2):
        window.open()
        model(tokens()).backward()
        window.close()
    assert seen == [f"{part}.{n}" for part in ("eager", "fast") for n in NAMES] * 2
    assert counters["stats"]["unique_graphs"] == 1
    rows = {c.places: c.reason == SHADOW for c in window.coverage()}
    assert rows == {tuple(f"{part}.{n}" for n in NAMES): part == "fast" for part in ("eager", "fast")}


class ScriptedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return torch.softmax(q @ q.transpose(1, 2), -1) @ x


def test_a_scripted_layer_is_told() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.attention = torch.jit.script(ScriptedAttention())
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attention(x))

    model, seen = Own(), []
    window = capture(model, seen)
    window.open()
    model(tokens())
    window.close()
    assert seen == ["attn"]
    told = {c.reason: c.places for c in window.coverage() if c.sight == "unseen"}
    assert told == {"inside torch.jit.script: attention not seen": ("attention",)}


def test_before_and_after_the_first_sample() -> None:
    class Own(nn.Module):
        """Attention by a kernel of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.cross_attention = OwnAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.cross_attention(x)

    class OwnAttention(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)

    window = capture(Own())
    assert [c.reason for c in window.coverage()] == ["not sampled yet"]
    window.open()
    window.close()
    (row,) = window.coverage()
    assert (row.sight, row.places) == ("unseen", ("cross_attention",))
    assert row.reason == "no attention call was seen in its training forward pass"
    assert capture(nn.Linear(2, 2)).coverage() == ()
