"""Two models that compute the same function look the same to the rules, however their weights are written.

Both are led along one path on which attention logits grow until rules speak; an optimizer would lead them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.engine.diagnostics import Diagnostics
from traindiag.rules.default_pack import default_rules

WIDTH, HEADS, LAYERS, WORDS, LENGTH = 16, 4, 2, 64, 32
SIZE = WIDTH // HEADS
STEPS, GROWTH = 12, 1.7


class Attention(nn.Module):
    """``fused``: one projection for queries, keys and values; ``written_out``: a softmax that everyone can see."""

    def __init__(self, fused: bool, written_out: bool) -> None:
        super().__init__()
        self.written_out = written_out
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of query, key and value, as views."""
        if hasattr(self, "qkv"):
            return list(zip(self.qkv.weight.data.chunk(3), self.qkv.bias.data.chunk(3)))
        return [(p.weight.data, p.bias.data) for p in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in parts)
        if self.written_out:
            scores = q @ k.transpose(-2, -1) / SIZE**0.5
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, fused: bool, written_out: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(fused, written_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm(x))
        return out


class GPT(nn.Module):
    """The same numbers whatever the switches."""

    def __init__(self, fused: bool = False, written_out: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(fused, written_out) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(WORDS, WIDTH, generator=draw))
            for attention in self.attentions:
                for weight, bias in attention.projections():
                    weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw) * WIDTH**-0.5)
                    bias.zero_()
                attention.out.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw) * WIDTH**-0.5)
            self.head.weight.copy_(torch.randn(WORDS, WIDTH, generator=draw) * WIDTH**-0.5)
            self.head.bias.zero_()

    @property
    def attentions(self) -> list[Any]:
        return [block.attention for block in self.blocks]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


Readings = dict[str, np.ndarray]
Verdicts = list[tuple[Any, ...]]
SAME = ("attention/logit_range", "attention/entropy", "output/target_z_score", "activation/rms", "loss/value")


def tokens(step: int, length: int) -> Tensor:
    return torch.randint(WORDS, (3, length + 1), generator=torch.Generator().manual_seed(step))


def watch(model: GPT, length: int = LENGTH, **settings: Any) -> tuple[Readings, Verdicts]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    # as rules of one's own, by another name, each tells its verdicts by itself, whatever failure they belong to
    own = default_rules()
    for rule in own:
        rule.name = f"own {rule.name}"
    rules: dict[str, Any] = {"default_rules": False, "rules": own}
    diagnostics = Diagnostics(
        model, optimizer, every_n_steps=1, max_overhead=None, terminal=False, strict=True, **rules, **settings
    )
    for step in range(STEPS):
        batch = tokens(step, length)
        with diagnostics.step() as s:
            s.loss(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad()
        for attention in model.attentions:
            for tensor in attention.projections()[0]:
                tensor *= GROWTH
    diagnostics.finish()
    alerts = [a for a in diagnostics.alerts if a.kind != "wiring"]  # of parameters: others make the same function
    verdicts = [
        (a.status, a.rule.removeprefix("own "), a.step, a.severity, a.signal, a.where, a.kind) for a in alerts
    ]
    return {name: np.array(series.values) for name, series in diagnostics.history.items()}, verdicts


@functools.cache
def reference() -> tuple[Readings, Verdicts]:
    return watch(GPT())


def assert_same(model: GPT, *, besides: str = "", rtol: float = 1e-4) -> Readings:
    """Also that something was told in both, and by whom.

    Args:
        model: The same function as the reference.
        besides: A rule on what is no property of the function.
        rtol: Of the numbers.
    """
    (expected, told), (found, told_again) = reference(), watch(model)
    for name in SAME:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-4, err_msg=name)
    rules = {verdict[1] for verdict in told}
    assert {"attention/logit-range", "attention/logit-range-to-damage"} <= rules
    assert [v for v in told_again if v[1] != besides] == [v for v in told if v[1] != besides]
    return found


def test_the_path_goes_from_health_to_damage() -> None:
    readings = reference()[0]
    largest = readings["attention/logit_range"].max(1)
    assert largest[0] < 10 and 1e3 < largest[-1] < 1e4
    assert (readings["attention/max_logit"] < 1e4).all()
    assert all(np.isfinite(values).all() for name, values in readings.items() if name in SAME)


def model_with_key_bias(size: float) -> GPT:
    model = GPT()
    for attention in model.attentions:
        attention.projections()[1][1].fill_(size)
    return model


@pytest.mark.parametrize("size", [0.3, -2.0])
def test_a_bias_that_all_keys_share(size: float) -> None:
    found = assert_same(model_with_key_bias(size))
    raw = reference()[0]["attention/max_logit"]
    assert not np.allclose(found["attention/max_logit"], raw, rtol=0.02)  # what does feel it


def test_a_huge_bias_that_all_keys_share_is_told_as_what_it_is() -> None:
    """Nothing but the loss of precision, and that as information."""
    found = assert_same(model_with_key_bias(60.0), besides="attention/max-logit-precision", rtol=2e-3)
    assert found["attention/max_logit"].max() > 1e4
    assert ("attention/max-logit-precision", "info") in {(v[1], v[3]) for v in watch(model_with_key_bias(60.0))[1]}


@pytest.mark.parametrize("constant", [50.0, -300.0])
def test_a_constant_on_all_output_logits(constant: float) -> None:
    model = GPT()
    model.head.bias.data.fill_(constant)
    found = assert_same(model)
    np.testing.assert_allclose(found["output/log_z"], reference()[0]["output/log_z"] + constant, rtol=1e-5)


@pytest.mark.parametrize("factor", [4.0, 1 / 3])
def test_queries_larger_and_keys_smaller(factor: float) -> None:
    model = GPT()
    for attention in model.attentions:
        (query, _), (key, _), _ = attention.projections()
        query *= factor
        key /= factor
    found = assert_same(model, besides="gradient/norm-spike")  # a gradient is one of weights
    for name, by in (("query_norm", factor), ("key_norm", 1 / factor)):
        expected = reference()[0][f"attention/{name}"] * by
        np.testing.assert_allclose(found[f"attention/{name}"], expected, rtol=1e-4)


def test_heads_in_another_order() -> None:
    order = [2, 0, 3, 1]
    model = GPT()
    rows = torch.tensor(order)[:, None] * SIZE + torch.arange(SIZE)
    for attention in model.attentions:
        for tensor in (t for pair in attention.projections() for t in pair):
            tensor.copy_(tensor[rows.flatten()].clone())
        attention.out.weight.data = attention.out.weight.data[:, rows.flatten()].clone()
    cells = np.concatenate([np.array(order) + HEADS * layer for layer in range(LAYERS)])
    (expected, told), (found, told_again) = reference(), watch(model)
    for name in ("attention/logit_range", "attention/max_logit", "attention/entropy", "attention/query_norm"):
        np.testing.assert_allclose(found[name], expected[name][:, cells], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found["output/target_z_score"], expected["output/target_z_score"], rtol=1e-4)

    def moved(where: str) -> str:
        layer, _, head = where.partition(" head ")
        return f"{layer} head {order.index(int(head))}" if head else where

    assert [(*v[:5], moved(v[5]), v[6]) for v in told] == told_again


@pytest.mark.parametrize("build", [lambda: GPT(fused=True), lambda: GPT(written_out=True)], ids=["fused", "written"])
def test_the_same_products_written_in_another_way(build: Callable[[], GPT]) -> None:
    found = assert_same(build())
    np.testing.assert_allclose(found["attention/max_logit"], reference()[0]["attention/max_logit"], rtol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [2.0, 60.0])
def test_a_bias_that_all_keys_share_in_a_long_text(size: float, exact: bool) -> None:
    """Above 32 rows a bias changes which of them hold the largest logits, and not which feel the most."""
    models = GPT(), model_with_key_bias(size)
    (plain, told), (found, told_again) = (watch(m, length=80, exact=exact) for m in models)
    np.testing.assert_allclose(found["attention/logit_range"], plain["attention/logit_range"], rtol=2e-3)
    assert told == [v for v in told_again if v[1] != "attention/max-logit-precision"]
    assert "attention/logit-range" in {v[1] for v in told}
