"""Every way of writing attention is seen, at the right layer, with values that hold against fp64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import softmax as imported_softmax
from torch.utils.checkpoint import checkpoint

from tests.capture.oracle import Sample, assert_brackets, scale_up, true_logits

LENGTH, WIDTH, HEADS = 48, 16, 4


class Attention(nn.Module):
    def __init__(self, key_heads: int = HEADS, **call: Any) -> None:
        super().__init__()
        self.call, self.key_heads, size = call, key_heads, WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * size) for n in (HEADS, key_heads, key_heads))
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.key_heads != HEADS, **self.call)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.split(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm, self.mlp = attention, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + F.gelu(self.mlp(x))


class GPT(nn.Module):
    def __init__(
        self, attention: Any = Attention, checkpointing: bool | None = None, gain: float = 8, **kw: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(attention(**kw)) for _ in range(2))
        self.reentrant = checkpointing
        self.runs = 0
        scale_up(self, gain, ".q.", ".k.")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x.square().mean()


def tokens(grad: bool = False) -> Tensor:
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(grad)


def truth_of(model: nn.Module, *args: Any) -> list[Tensor]:
    with true_logits() as truths:
        model(*args)
    return truths


NAMES = ["blocks.0.attn", "blocks.1.attn"]
SEEN = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4
SEEN[:, :, 7] = False


@pytest.mark.parametrize(
    ("keywords", "with_lse"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"attn_mask": SEEN}, True),
        ({"attn_mask": torch.zeros(SEEN.shape).masked_fill(~SEEN, -math.inf)}, True),
        ({"attn_mask": torch.zeros(SEEN.shape).masked_fill(~SEEN, torch.finfo(torch.float32).min)}, True),
        ({"attn_mask": torch.linspace(-3, 3, LENGTH)[None]}, True),
        ({"key_heads": 2, "is_causal": True}, True),
        ({"scale": 0.9}, True),
        ({"dropout_p": 0.2, "is_causal": True}, False),
    ],
    ids=["plain", "causal", "bool", "-inf", "finfo.min", "bias", "grouped", "scale", "dropout"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused(keywords: dict[str, Any], with_lse: bool, precision: str) -> None:
    model, x = GPT(**keywords), tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        torch.manual_seed(5)
        truths = truth_of(model, x)
        torch.manual_seed(5)
        sample = Sample(model, lambda: model(x), rows=4)
        torch.manual_seed(5)
        exact = Sample(model, lambda: model(x), rows=4, exact=True)
    assert sample.calls == [(name, with_lse) for name in NAMES]
    assert_brackets(sample, truths)
    assert (truths[0] > 15).all()
    for layer, truth in zip(NAMES, truths, strict=True):
        torch.testing.assert_close(exact.of("max_logit", layer), truth, rtol=1e-4, atol=0)
        assert torch.equal(exact.of("max_logit", layer), exact.of("max_logit_bound", layer))
    assert [(c.sight, c.places) for c in sample.coverage] == [("bound", tuple(NAMES))]


def soft_f(z: Tensor) -> Tensor:
    return F.softmax(z, dim=-1)


def soft_positional(z: Tensor) -> Tensor:
    return torch.softmax(z, 3)


def soft_imported(z: Tensor) -> Tensor:
    return imported_softmax(z, -1, dtype=torch.float32)


def soft_method(z: Tensor) -> Tensor:
    return z.softmax(-1)


def product_at(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def product_matmul(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.mT)


def product_method(q: Tensor, k: Tensor) -> Tensor:
    return q.matmul(k.mT)


def product_einsum(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k)


def product_einsum_swapped(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bjhd,bihd->bhij", k.transpose(1, 2), q.transpose(1, 2))


def product_bmm(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(len(q), HEADS, *q.shape[2:3], -1)


class Eager(Attention):
    def __init__(self, product: Any, soft: Any) -> None:
        super().__init__()
        self.product, self.soft = product, soft

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = self.product(q, k) * q.shape[-1] ** -0.5
        z = z.masked_fill(torch.ones(z.shape[-2:]).triu(1).bool(), -math.inf)
        return self.soft(z) @ v


class EagerModule(Eager):
    """Softmax as a child module."""

    def __init__(self) -> None:
        super().__init__(product_at, nn.Softmax(dim=-1))


STYLES = [
    (product_at, soft_f),
    (product_matmul, soft_positional),
    (product_method, soft_method),
    (product_einsum, soft_imported),
    (product_einsum_swapped, soft_f),
    (product_bmm, soft_f),
]


@pytest.mark.parametrize(
    "attention",
    [*(partial(Eager, p, s) for p, s in STYLES), EagerModule],
    ids=[*(f"{p.__name__}-{s.__name__}" for p, s in STYLES), "nn.Softmax"],
)
def test_written_out(attention: Any) -> None:
    model, x = GPT(attention), tokens()
    causal = GPT(is_causal=True)
    causal.load_state_dict(model.state_dict())
    truths, fused = truth_of(causal, x), Sample(causal, lambda: causal(x))
    sample = Sample(model, lambda: model(x))
    assert sample.layers == NAMES
    for layer, truth in zip(NAMES, truths, strict=True):
        torch.testing.assert_close(sample.of("max_logit", layer), truth, rtol=1e-5, atol=0)
        assert torch.equal(sample.of("max_logit", layer), sample.of("max_logit_bound", layer))
        for signal in ("query_norm", "key_norm", "entropy"):
            torch.testing.assert_close(sample.of(signal, layer), fused.of(signal, layer), rtol=1e-4, atol=1e-4)
    assert [(c.sight, c.places) for c in sample.coverage] == [("exact", tuple(NAMES))]


class Normalised(Eager):
    """Takes a softmax of what attention returns."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(super().attend(q, k, v), -1)


def test_weights_times_values_are_no_scores() -> None:
    model = GPT(partial(Normalised, product_at, soft_f))
    assert Sample(model, lambda: model(tokens())).layers == NAMES


class ImportedEarly(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


def test_imported_by_name_and_called_by_keyword() -> None:
    model, x = GPT(ImportedEarly), tokens()
    reference = GPT(is_causal=True)
    reference.load_state_dict(model.state_dict())
    sample = Sample(model, lambda: model(x))
    assert sample.layers == NAMES
    assert_brackets(sample, truth_of(reference, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", [partial(Attention, is_causal=True), EagerModule], ids=["fused", "eager"])
def test_checkpointed_blocks_count_once(attention: Any, reentrant: bool) -> None:
    model, x = GPT(attention, checkpointing=reentrant), tokens(grad=True)
    forwards: list[int] = []
    model.blocks[0].attn.out.register_forward_hook(lambda *_: forwards.append(1))
    sample = Sample(model, lambda: model(x), backward=False)
    assert forwards == [1], "reading the log-sum-exp ran the block again"
    assert sample.calls == [(name, False) for name in NAMES]
    sample = Sample(model, lambda: model(x))
    assert sample.layers == NAMES
    plain = GPT(attention)
    whole = Sample(plain, lambda: plain(x), exact=True)
    for layer in NAMES:
        assert (sample.of("max_logit", layer) <= whole.of("max_logit", layer) * (1 + 1e-6)).all()
        assert (whole.of("max_logit", layer) <= sample.of("max_logit_bound", layer) * (1 + 1e-6)).all()


def multi_head_truth(module: nn.MultiheadAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """From the projection weights, fp64."""
    w, b = module.in_proj_weight.double(), module.in_proj_bias.double()
    q, k, _ = (x.double() @ w.T + b).chunk(3, -1)
    q, k = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k))
    z = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return (z if mask is None else z + mask).amax((0, 2, 3)).detach()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_multi_head_attention_module(need_weights: bool, padded: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), tokens()
    scale_up(module, 6, "in_proj")
    model = nn.ModuleDict({"mixer": module})
    padding = (torch.arange(LENGTH) > 30).expand(2, -1) if padded else None
    mask = torch.zeros(LENGTH).masked_fill(padding[0], -math.inf) if padding is not None else None

    def forward() -> Tensor:
        out, _ = model["mixer"](x, x, x, key_padding_mask=padding, need_weights=need_weights)
        return out.square().mean()

    sample = Sample(model, forward, rows=4)
    assert sample.layers == ["mixer"]
    truth = multi_head_truth(module, x, mask)
    assert (truth > 15).all()
    value, bound = sample.of("max_logit", "mixer"), sample.of("max_logit_bound", "mixer")
    torch.testing.assert_close(value, truth, rtol=2e-6, atol=0)
    assert torch.equal(value, bound)
    w, b = module.in_proj_weight.double(), module.in_proj_bias.double()
    for at, signal in enumerate(("query_norm", "key_norm")):
        projected = (x.double() @ w.T + b).chunk(3, -1)[at].unflatten(-1, (HEADS, -1))
        expected = projected.square().sum(-1).mean((0, 1)).sqrt().detach()
        torch.testing.assert_close(sample.of(signal, "mixer"), expected, rtol=1e-5, atol=0)
    assert F.softmax.__module__ == "torch.nn.functional"
    assert torch.bmm.__class__.__name__ == "builtin_function_or_method"


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), tokens()
    scale_up(model, 6, "in_proj")
    sample = Sample(model, lambda: model(x).square().mean(), rows=4)
    names = ["layers.0.self_attn", "layers.1.self_attn"]
    assert sample.calls == [(name, True) for name in names]
    inputs: list[Tensor] = []
    for encoder in model.layers:
        encoder.self_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(x)
    truths = [multi_head_truth(e.self_attn, z, None) for e, z in zip(model.layers, inputs, strict=True)]
    assert_brackets(sample, truths, rtol=1e-6)


class Router(nn.Module):
    """A mixture of experts inside an attention block: softmax over experts is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.gate = Attention(), nn.Linear(WIDTH, 4)
        self.weight = nn.Parameter(torch.randn(WIDTH, 4))
        self.transposed = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        for probabilities in (self.gate(x).softmax(-1), torch.softmax(x @ self.weight, -1)):
            x = x + torch.einsum("bte,edf,btd->btf", probabilities, self.experts, x)
        return F.softmax(x, -1) + F.softmax(x @ self.transposed.mT, -1).sum()


def test_routers_are_not_attention() -> None:
    torch.manual_seed(0)
    model = Router()
    assert Sample(model, lambda: model(tokens()).square().mean()).layers == ["attn"]


def test_bf16_weights() -> None:
    model, x = GPT(is_causal=True).bfloat16(), tokens().bfloat16()
    truths = truth_of(model, x)
    sample = Sample(model, lambda: model(x), rows=4)
    assert_brackets(sample, truths)
