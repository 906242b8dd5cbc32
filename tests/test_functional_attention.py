"""Attention statistics against plain fp64 loops: values that occurred, bounds that hold, nothing lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from traindiag.functional import attention
from traindiag.functional.attention import AttentionStatistics, attention_statistics, score_statistics

MASKS = ("none", "causal", "boolean", "-inf", "finfo.min", "-1e9", "bias")


@dataclass
class Truth:
    logits: list[list[float]]
    row_entropy: dict[tuple[int, int, int], float]
    row_range: dict[tuple[int, int, int], float]

    def largest(self, head: int) -> float:
        return max(self.logits[head], default=-math.inf)


def truth(query: Tensor, key: Tensor, allowed: np.ndarray, bias: np.ndarray, scale: float) -> Truth:
    """Row by row in numpy, fp64. ``allowed`` and ``bias`` are ``[B, H, T, S]``."""
    q, k = query.double().numpy(), key.double().numpy()
    batch, heads, length, _ = q.shape
    found = Truth([[] for _ in range(heads)], {}, {})
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h * k.shape[1] // heads]
            for i in range(length):
                row = np.array([scale * q[b, h, i].dot(kj) for kj in keys]) + bias[b, h, i]
                row = row[allowed[b, h, i]]
                if not row.size:
                    continue
                found.logits[h].extend(row.tolist())
                p = np.exp(row - row.max())
                p /= p.sum()
                found.row_entropy[b, h, i] = float(-(p[p > 0] * np.log(p[p > 0])).sum())
                found.row_range[b, h, i] = float(row.max() - row.mean())
    return found


def random_mask(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[dict[str, Any], Any, Any]:
    """Keywords for the call, what is allowed, and the finite bias; rows that see nothing are included."""
    if kind == "none":
        return {}, np.ones(shape, bool), np.zeros(shape)
    if kind == "causal":
        return {"is_causal": True}, np.tril(np.ones(shape[-2:], bool)) & np.ones(shape, bool), np.zeros(shape)
    lean = tuple(n if rng.random() < 0.7 else 1 for n in shape)
    if kind == "bias":
        bias = (5 * rng.standard_normal(lean)).astype(np.float32)
        return {"mask": torch.from_numpy(bias)}, np.ones(shape, bool), np.broadcast_to(bias, shape).astype(float)
    seen = rng.random(lean) < rng.choice([0.2, 0.8])
    allowed = np.broadcast_to(seen, shape)
    if kind == "boolean":
        return {"mask": torch.from_numpy(seen)}, allowed, np.zeros(shape)
    low = {"-inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min, "-1e9": -1e9}[kind]
    return {"mask": torch.from_numpy(np.where(seen, 0, low).astype(np.float32))}, allowed, np.zeros(shape)


def kernel_logsumexp(query: Tensor, key: Tensor, allowed: np.ndarray, bias: np.ndarray, scale: float, empty: float):
    full = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ full.mT * scale + torch.tensor(bias)
    logits = logits.masked_fill(~torch.tensor(allowed), -math.inf)
    lse = logits.logsumexp(-1).float()
    lse[lse == -math.inf] = empty
    return torch.nn.functional.pad(lse, (0, 5), value=math.inf)  # padding rows, as the memory-efficient kernel writes


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    length=st.integers(1, 24),
    columns=st.integers(1, 20),
    mask=st.sampled_from(MASKS),
    lse=st.sampled_from([None, 0.0, math.inf]),
    rows=st.integers(1, 4),
    exact=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_value_occurred_and_bound_holds(
    seed, batch, key_heads, group, length, columns, mask, lse, rows, exact, size
) -> None:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    query = size * torch.randn(batch, key_heads * group, length, 4, generator=generator)
    key = size * torch.randn(batch, key_heads, columns, 4, generator=generator)
    scale = float(rng.choice([0.5, -0.7, 2.0]))
    keywords, allowed, bias = random_mask(mask, (batch, key_heads * group, length, columns), rng)
    expected = truth(query, key, allowed, bias, scale)
    if lse is not None:
        keywords["logsumexp"] = kernel_logsumexp(query, key, allowed, bias, scale, lse)
    found = attention_statistics(query, key, scale=scale, rows=rows, exact=exact, **keywords)

    everything = exact or length <= 2 * rows
    even = list(range(length)) if everything else [(2 * i + 1) * length // (2 * rows) for i in range(rows)]
    for h in range(key_heads * group):
        value, bound = found.max_logit[h].item(), found.max_logit_bound[h].item()
        largest = expected.largest(h)
        near = 1e-5 + 1e-5 * abs(largest) if largest > -math.inf else 0
        assert bound >= value
        assert value <= largest + near
        assert bound >= largest - near
        if value > -math.inf:
            assert min(abs(value - z) for z in expected.logits[h]) <= 1e-4, "a logit that never was"
        if everything:
            assert value == bound == pytest.approx(largest, rel=1e-4, abs=1e-4)
            ranges = [r for (_, head, _), r in expected.row_range.items() if head == h]
            assert found.logit_range[h].item() == pytest.approx(max(ranges, default=-math.inf), rel=1e-4, abs=1e-4)
        counted = [e for (_, head, i), e in expected.row_entropy.items() if head == h and i in even]
        assert found.entropy_rows[h].item() == len(counted)
        assert found.entropy_sum[h].item() == pytest.approx(sum(counted), rel=1e-3, abs=1e-3)
        assert found.query_square_sum is not None
        assert found.key_square_sum is not None
        assert found.query_square_sum[h].item() == pytest.approx(query[:, h].double().square().sum().item(), rel=1e-5)
        of_key = key[:, h // group].double().square().sum().item()
        assert found.key_square_sum[h].item() == pytest.approx(of_key, rel=1e-5)
    assert found.query_rows is not None
    assert found.key_rows is not None
    assert found.query_rows.tolist() == [batch * length] * (key_heads * group)
    assert found.key_rows.tolist() == [batch * columns] * (key_heads * group)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 24),
    columns=st.integers(1, 20),
    mask=st.sampled_from(MASKS[2:]),
    rows=st.integers(1, 4),
)
def test_scores_have_an_exact_maximum(seed, length, columns, mask, rows) -> None:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(2, 4, length, 4, generator=generator)
    key = 3 * torch.randn(2, 2, columns, 4, generator=generator)
    keywords, allowed, bias = random_mask(mask, (2, 4, length, columns), rng)
    expected = truth(query, key, allowed, bias, 0.5)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.5
    given_mask = keywords["mask"]
    if given_mask.dtype == torch.bool:
        scores = scores.masked_fill(~given_mask, torch.finfo(torch.float32).min)
    else:
        scores = scores + given_mask
    found = score_statistics(scores, query=query, key=key, rows=rows)
    assert torch.equal(found.max_logit, found.max_logit_bound)
    fused = attention_statistics(query, key, scale=0.5, rows=rows, exact=True, **keywords)
    for h in range(4):
        assert found.max_logit[h].item() == pytest.approx(expected.largest(h), rel=1e-5, abs=1e-4)
        assert found.logit_range[h] <= fused.logit_range[h] + 1e-3
    torch.testing.assert_close(found.query_square_sum, fused.query_square_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.key_square_sum, fused.key_square_sum, rtol=1e-6, atol=0)
    if length <= 2 * rows:
        torch.testing.assert_close(found.logit_range, fused.logit_range)
        torch.testing.assert_close(found.entropy_sum, fused.entropy_sum)


def hot(length: int = 200, size: int = 16, gain: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key = (gain * torch.randn(2, 2, length, size, generator=generator) for _ in range(2))
    logits = query.double() @ key.double().mT * size**-0.5
    return query, key, logits.logsumexp(-1).float(), logits.amax((0, 2, 3))


def test_large_logits_are_certified_by_the_log_sum_exp() -> None:
    query, key, lse, largest = hot()
    assert (largest > 15).all()
    found = attention_statistics(query, key, logsumexp=lse)
    torch.testing.assert_close(found.max_logit.double(), largest, rtol=1e-6, atol=0)
    assert torch.equal(found.max_logit, found.max_logit_bound)
    by_norms = attention_statistics(query, key)
    assert (by_norms.max_logit_bound > by_norms.max_logit).all()


def test_exact_equals_truth_and_never_holds_the_score_matrix() -> None:
    query, key, _, largest = hot(length=300)
    biggest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            nonlocal biggest
            if isinstance(out, Tensor):
                biggest = max(biggest, out.untyped_storage().nbytes() // out.element_size())
            return out

    whole = attention_statistics(query, key, exact=True)
    before, attention._BLOCK = attention._BLOCK, 300 * 40
    try:
        with Watch():
            blocked = attention_statistics(query, key, exact=True)
    finally:
        attention._BLOCK = before
    torch.testing.assert_close(blocked.max_logit.double(), largest, rtol=1e-6, atol=0)
    assert biggest < 300 * 300
    for a, b in zip(whole, blocked):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("with_lse", [False, True])
def test_what_is_not_finite_is_not_lost(where: str, bad: float, with_lse: bool) -> None:
    query, key, lse, _ = hot()
    {"query": query, "key": key}[where][1, 0, 77, 5] = bad
    for exact in (False, True):
        found = attention_statistics(query, key, logsumexp=lse if with_lse else None, exact=exact)
        if math.isnan(bad):
            assert found.max_logit[0].isnan()
            assert found.max_logit_bound[0].isnan()
        else:
            assert not found.max_logit_bound[0].isfinite()
        assert found.max_logit[1].isfinite()
    scores = query @ key.mT
    assert not score_statistics(scores).max_logit[0].isfinite()


@pytest.mark.parametrize("with_lse", [False, True])
def test_nan_in_a_key_that_few_rows_see(with_lse: bool) -> None:
    query, key, lse, _ = hot()
    key[0, 1, -1] = math.nan
    found = attention_statistics(query, key, is_causal=True, logsumexp=lse if with_lse else None, rows=2)
    assert found.max_logit.isnan().tolist() == found.max_logit_bound.isnan().tolist() == [False, True]


def test_without_a_key_to_attend_to_there_is_no_logit() -> None:
    query, key, lse, _ = hot(length=40)
    nothing = torch.zeros(40, 40, dtype=torch.bool)
    for found in (
        attention_statistics(query, key, mask=nothing, logsumexp=torch.zeros_like(lse)),
        score_statistics(torch.full((2, 2, 40, 40), -math.inf)),
        attention_statistics(query[:0], key[:0]),
        score_statistics(torch.zeros(0, 2, 40, 40)),
    ):
        assert found.max_logit.tolist() == found.max_logit_bound.tolist() == [-math.inf] * 2
        assert found.logit_range.tolist() == [-math.inf] * 2
        assert found.entropy_rows.tolist() == found.entropy_sum.tolist() == [0, 0]


def test_dimensions() -> None:
    query, key, _, largest = hot(length=40)
    mask = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    four = attention_statistics(query, key, mask=mask, exact=True)
    five = attention_statistics(query[None], key[None], mask=mask[None], exact=True)
    split = attention_statistics(query[:, None], key[:, None], mask=mask[:, None], exact=True)
    for a, b, c in zip(four, five, split):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    headless = attention_statistics(query[:, 0], key[:, 0], exact=True)
    assert headless.max_logit.shape == (1,)
    assert headless.max_logit.item() == pytest.approx(largest[0].item(), rel=1e-6)
    masked = attention_statistics(query[:, 0], key[:, 0], mask=mask[:, 0], exact=True)
    assert masked.max_logit[0] == four.max_logit[0]


@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "additive", "lse", "exact"])
def test_traceable_into_one_graph(kind: str) -> None:
    query, key, lse, _ = hot(length=50)
    mask = torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) > 0.3
    keywords: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"mask": mask},
        "additive": {"mask": torch.zeros(50, 50).masked_fill(~mask, -math.inf)},
        "lse": {"logsumexp": lse},
        "exact": {"exact": True},
    }[kind]

    def statistics(q: Tensor, k: Tensor) -> AttentionStatistics:
        return attention_statistics(q, k, rows=4, **keywords)

    torch._dynamo.reset()
    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")(query, key)
    for a, b in zip(statistics(query, key), compiled):
        torch.testing.assert_close(a, b)


def test_scores_are_traceable_into_one_graph() -> None:
    scores = torch.randn(2, 2, 50, 50, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(score_statistics, fullgraph=True, backend="aot_eager")(scores, rows=4)
    for a, b in zip(score_statistics(scores, rows=4)[:5], compiled[:5]):
        torch.testing.assert_close(a, b)


def test_half_precision_inside_autocast_is_computed_in_fp32() -> None:
    query, key, _, _ = hot()
    query, key = query.bfloat16(), key.bfloat16()
    largest = (query.double() @ key.double().mT * 0.25).amax((0, 2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_statistics(query, key, exact=True)
    assert found.max_logit.dtype == torch.float32
    torch.testing.assert_close(found.max_logit.double(), largest, rtol=1e-6, atol=0)


def test_no_gradient_and_no_graph() -> None:
    query, key, _, _ = hot(length=40)
    found = attention_statistics(query.requires_grad_(), key)
    assert not any(t.requires_grad for t in found if t is not None)


@pytest.mark.parametrize(
    ("query", "key", "keywords", "message"),
    [
        ((1, 3, 4, 2), (1, 2, 4, 2), {}, "do not fit"),
        ((1, 2, 4, 2), (1, 2, 4, 3), {}, "do not fit"),
        ((1, 2, 4, 2), (1, 2, 4, 2), {"rows": 0}, "at least 1, got 0"),
        ((1, 2, 4, 2), (1, 2, 4, 2), {"is_causal": True, "mask": torch.ones(4, 4)}, "exclude each other"),
        ((4,), (4,), {}, "at least two dimensions"),
    ],
)
def test_wrong_arguments_are_told(query, key, keywords, message) -> None:
    with pytest.raises(ValueError, match=message):
        attention_statistics(torch.ones(query), torch.ones(key), **keywords)
