"""What attention logits say, from queries and keys of a fused kernel or from scores that a model wrote out itself.

Computing every logit would cost what the fused kernel saves. Rows are ranked by a ceiling that no logit of the row
can exceed: its log-sum-exp where the kernel kept one, ``|q_i| max_j |k_j| |scale|`` otherwise. The logits of the
rows with the highest ceilings are computed, so that the largest one *occurred*, and the highest ceiling among the
rows left out bounds what was missed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**22
"""Logits held at a time: 16 MiB in fp32, whatever the length of the sequence."""

_FLOOR = -1e8
"""No bias that lets a key be seen is this low; -1e9 and the like stand for "masked"."""

_HIGHEST_PER_CALL, _SPACED_PER_CALL = 64, 32
"""Rows of a head over the whole batch that are enough: a large batch needs fewer of each item."""

_CANDIDATES = 128
"""Rows of a head that are compared by their range, and keys that stand for all of them there."""

_SLACK = 2e-5
"""A kernel rounds its log-sum-exp (measured: 8e-6 in fp32), and we round norms: a ceiling stays above the truth."""


class AttentionStatistics(NamedTuple):
    """Statistics of one attention call, each ``[heads]``, fp32, on the device of the input.

    Args:
        max_logit: Largest logit found over batch and rows; ``-inf`` where nothing may be attended to.
        max_logit_bound: Never below the true maximum; equal to ``max_logit`` where that is known to be exact.
        logit_range: Largest row maximum less row mean over unmasked keys, over the rows looked at.
        entropy_sum: Sum over rows of the entropy of the attention weights, in nat.
        entropy_rows: Number of rows in that sum.
        query_square_sum: Sum over batch and rows of the squared query norm; None where only scores are known.
        query_rows: Number of rows in that sum.
        key_square_sum: The same of keys, those of a shared key head repeated for its query heads.
        key_rows: Number of keys in that sum.
    """

    max_logit: Tensor
    max_logit_bound: Tensor
    logit_range: Tensor
    entropy_sum: Tensor
    entropy_rows: Tensor
    query_square_sum: Tensor | None = None
    query_rows: Tensor | None = None
    key_square_sum: Tensor | None = None
    key_rows: Tensor | None = None


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logsumexp: Tensor | None = None,
    rows: int = 16,
    exact: bool = False,
) -> AttentionStatistics:
    """Statistics of ``softmax(query @ key^T * scale + mask)`` without the score matrix.

    Reads nothing back to the host and does not branch on values, so it can be traced into a compiled graph.

    Args:
        query: ``[..., heads, T, size]``; three dimensions are a batch without heads.
        key: ``[..., key heads, S, size]``; the number of heads is a multiple of the number of key heads.
        mask: Boolean (True: may attend) or additive, broadcastable to ``[..., heads, T, S]``.
        is_causal: Row ``i`` attends to columns ``j <= i``, aligned at the top left as in
            :func:`torch.nn.functional.scaled_dot_product_attention`.
        scale: Factor on the products; ``1 / sqrt(size)`` by default.
        logsumexp: ``[..., heads, >= T]`` of the scaled and masked logits; columns beyond ``T`` are padding.
        rows: Rows computed per head and batch item, at most: this many with the highest ceilings, as many evenly
            spaced (entropy uses only the latter, which makes it unbiased), and a quarter as many where the ceiling
            is highest above the mean logit. Fewer where the batch has many items.
        exact: Compute every row, block by block.

    Raises:
        ValueError: If shapes do not fit, or for a mask together with ``is_causal``.

    Example:
        >>> q, k = torch.tensor([[[[3.0], [1.0]]]]), torch.tensor([[[[2.0], [4.0]]]])
        >>> s = attention_statistics(q, k, is_causal=True, scale=1.0)
        >>> s.max_logit.tolist(), s.max_logit_bound.tolist()
        ([6.0], [6.0])
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if mask is not None and is_causal:
        raise ValueError("a mask and is_causal exclude each other: merge them into the mask")
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        query, key = _with_heads(query), _with_heads(key)
        (batch, heads, length, size), (key_heads, columns) = query.shape, key.shape[1:3]
        if key.shape[0] != batch or heads % max(key_heads, 1) or key.shape[3] != size:
            raise ValueError(f"keys of shape {tuple(key.shape)} do not fit queries of shape {tuple(query.shape)}")
        scale = size**-0.5 if scale is None else scale
        if mask is not None:
            mask = _mask_with_heads(mask, query)
        repeat = heads // max(key_heads, 1)
        query_norm, key_norm = _norm(query), _norm(key)
        norms = _norm_sums(query_norm, key_norm, repeat)
        if not (batch and length and columns):
            return _nothing(heads, query.device)._replace(**norms)

        open_rows = row_bias = None
        if mask is not None:
            row_mask = mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1)
            open_rows = row_mask if mask.dtype == torch.bool else ~(row_mask <= _floor(mask.dtype))
            row_bias = None if mask.dtype == torch.bool else row_mask.float()
        if logsumexp is not None:
            ceiling = logsumexp.reshape(batch, heads, -1)[..., :length].float()
        else:
            largest_key = key_norm.amax(-1, keepdim=True).repeat_interleave(repeat, 1)
            ceiling = query_norm * largest_key * abs(scale)
            ceiling = ceiling if row_bias is None else ceiling + row_bias
        ceiling = ceiling + _SLACK * (1 + ceiling.abs())
        if open_rows is not None:
            # Kernels write 0 or +inf for a row that sees nothing.
            ceiling = ceiling.masked_fill(~open_rows, -torch.inf)

        centred = _centred(ceiling, query, key, scale) if not exact and length > 2 * rows else None
        chosen, spaced = _choose(ceiling, length if exact else rows, centred)
        parts = []
        for items, block in _blocks(batch, chosen.shape[-1], heads * columns):
            index = chosen[items, :, block]
            q = query[items].gather(2, index[..., None].expand(-1, -1, -1, size)).float() * scale
            k = key[items].float()
            logits = q.reshape(len(q), key_heads, -1, size) @ k.transpose(-1, -2)
            logits = logits.reshape(len(q), heads, -1, columns)
            allowed = count = None
            if is_causal:
                allowed = torch.arange(columns, device=index.device) <= index[..., None]
                count = (index + 1).clamp(max=columns)
            elif mask is not None:
                picked = _pick(mask[items] if len(mask) > 1 else mask, index)
                if picked.dtype == torch.bool:
                    allowed = picked
                else:
                    logits, allowed = logits + picked.float(), ~(picked <= _floor(picked.dtype))
            parts.append(_row_statistics(logits, allowed, count, spaced - block.start))
        found = _join(parts)
        rest = ceiling.scatter(-1, chosen, -torch.inf).amax((0, 2))
        # NaN or infinity in a row or key that was not looked at must not be lost.
        size_of_all = norms["query_square_sum"] + norms["key_square_sum"]
        value = found.max_logit.masked_fill(size_of_all.isnan(), torch.nan)
        bound = torch.where(size_of_all.isfinite(), torch.maximum(value, rest), size_of_all)
        return found._replace(max_logit=value, max_logit_bound=bound, **norms)


def score_statistics(
    scores: Tensor, *, query: Tensor | None = None, key: Tensor | None = None, rows: int = 16
) -> AttentionStatistics:
    """Statistics of scores as they enter a softmax. The maximum is exact: the model has all of them in memory.

    Args:
        scores: ``[..., heads, T, S]``, scaled and masked; three dimensions are a batch without heads.
        query: ``[..., heads, T, size]`` that made them, for the norms; None if unknown.
        key: ``[..., key heads, S, size]``.
        rows: As in :func:`attention_statistics`, for range and entropy.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> score_statistics(torch.tensor([[[[1.0, -torch.inf], [2.0, 5.0]]]])).max_logit.tolist()
        [5.0]
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        scores = _with_heads(scores)
        batch, heads, _, columns = scores.shape
        norms: dict[str, Tensor] = {}
        if query is not None and key is not None:
            query, key = _with_heads(query), _with_heads(key)
            norms = _norm_sums(_norm(query), _norm(key), query.shape[1] // max(key.shape[1], 1))
        if not scores.numel():
            return _nothing(heads, scores.device)._replace(**norms)
        floor = _floor(scores.dtype)
        row_max = scores.amax(-1).float()
        row_max = row_max.masked_fill(row_max <= floor, -torch.inf)
        chosen, spaced = _choose(row_max, rows)
        parts = []
        for items, block in _blocks(batch, chosen.shape[-1], heads * columns):
            picked = _pick(scores[items], chosen[items, :, block])
            parts.append(_row_statistics(picked.float(), ~(picked <= floor), None, spaced - block.start))
        value = row_max.amax((0, 2))
        return _join(parts)._replace(max_logit=value, max_logit_bound=value, **norms)


def _with_heads(x: Tensor) -> Tensor:
    """``[batch, heads, rows, columns]``."""
    if x.ndim < 2:
        raise ValueError(f"expected at least two dimensions [rows, columns], got shape {tuple(x.shape)}")
    if x.ndim == 2:
        return x[None, None]
    return x[:, None] if x.ndim == 3 else x.flatten(0, -4)


def _mask_with_heads(mask: Tensor, query: Tensor) -> Tensor:
    """Broadcastable to ``[batch, heads, T, S]``; only the batch dimensions are made full, and only if they differ."""
    if mask.ndim <= 2:
        return mask[(None,) * (4 - mask.ndim)]
    if query.shape[1] == 1 and mask.ndim == 3:
        return mask[:, None] if len(mask) in (1, len(query)) else mask[None]
    if mask.ndim == 3:
        return mask[None]
    if mask.ndim == 4 and len(mask) in (1, len(query)):
        return mask
    leading = query.shape[0] // max(mask.shape[:-3].numel(), 1)
    flat = mask.flatten(0, -4)
    return flat.repeat_interleave(leading, 0) if leading > 1 else flat


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norm


def _norm_sums(query_norm: Tensor, key_norm: Tensor, repeat: int) -> dict[str, Tensor]:
    query, key = query_norm.square().sum((0, 2)), key_norm.square().sum((0, 2)).repeat_interleave(repeat)
    return {
        "query_square_sum": query,
        "query_rows": torch.full_like(query, query_norm.shape[0] * query_norm.shape[2]),
        "key_square_sum": key,
        "key_rows": torch.full_like(key, key_norm.shape[0] * key_norm.shape[2]),
    }


def _floor(dtype: torch.dtype) -> float:
    return max(_FLOOR, torch.finfo(dtype).min / 2)


def _centred(ceiling: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Ceilings ``[batch, heads, T]`` less the mean logit with evenly spaced keys, masked ones too; ``-inf`` in rows
    that are not looked at. A shift that all keys share is in both in full.
    """
    query, key = (t[:, :, :: -(-t.shape[2] // _CANDIDATES)] for t in (query, key))
    mean_key = key.mean(2).repeat_interleave(query.shape[1] // key.shape[1], 1)
    mean_logit = (query @ mean_key[..., None])[..., 0].float() * scale
    centred = torch.full_like(ceiling, -torch.inf)
    step = -(-ceiling.shape[2] // _CANDIDATES)
    centred[..., ::step] = ceiling[..., ::step] - mean_logit
    return centred


def _choose(ceiling: Tensor, rows: int, centred: Tensor | None = None) -> tuple[Tensor, int]:
    """Indices ``[batch, heads, n]`` of the rows to look at, and how many of them, the first, are evenly spaced.

    Args:
        ceiling: What no logit of a row exceeds; rows with the highest may hold the largest logit.
        rows: Of each kind, at most.
        centred: Ceilings less mean logits, where known; rows with the highest may hold the largest range, which a
            bias on the keys leaves as it is while it moves the ceilings.
    """
    batch, heads, length = ceiling.shape
    if length <= 2 * rows:
        return torch.arange(length, device=ceiling.device).expand(batch, heads, -1), length
    highest, spaced = (min(rows, max(2, -(-n // batch))) for n in (_HIGHEST_PER_CALL, _SPACED_PER_CALL))
    even = ((torch.arange(spaced, device=ceiling.device) * 2 + 1) * length).div(2 * spaced, rounding_mode="floor")
    top = [ceiling.topk(highest, sorted=False).indices]
    if centred is not None:
        top.append(centred.topk(-(-highest // 4), sorted=False).indices)
    return torch.cat([even.expand(batch, heads, -1), *top], -1), spaced


def _blocks(batch: int, rows: int, width: int) -> list[tuple[slice, slice]]:
    """Cuts ``[batch, rows]`` so that a block holds about ``_BLOCK`` logits, at least one row."""
    items = max(1, _BLOCK // max(rows * width, 1))
    step = max(1, _BLOCK // width) if items == 1 else rows
    return [(slice(i, i + items), slice(j, j + step)) for i in range(0, batch, items) for j in range(0, rows, step)]


def _pick(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[b, h, n]`` of ``matrix`` ``[b, h or 1, T or 1, S or 1]``, broadcastable to the logits."""
    if matrix.shape[2] == 1:
        return matrix
    full = matrix.expand(*index.shape[:2], -1, -1)
    return full.gather(2, index[..., None].expand(-1, -1, -1, matrix.shape[3]))


def _row_statistics(logits: Tensor, allowed: Tensor | None, count: Tensor | None, spaced: int) -> AttentionStatistics:
    """Of ``logits`` ``[b, h, n, S]``; entropy over the first ``spaced`` rows of ``n``. The bound comes later.

    Args:
        logits: Of the rows looked at.
        allowed: Which may be attended to, broadcastable; None: all.
        count: ``[b, h, n]``, how many may, where that is known.
        spaced: How many rows, the first ones, are evenly spaced.
    """
    if allowed is None:
        row_max, mean = logits.amax(-1), logits.mean(-1)
        open_rows = None
    else:
        if count is None:
            allowed = allowed.expand_as(logits)
            count = allowed.sum(-1)
        mean = torch.where(allowed, logits, 0).sum(-1) / count
        logits = torch.where(allowed, logits, -torch.inf)
        row_max = logits.amax(-1)
        open_rows = count > 0
    value = row_max.amax((0, 2))
    spread = row_max - mean
    entropy = _entropy(logits[:, :, : max(spaced, 0)], row_max[:, :, : max(spaced, 0)])
    rows = torch.full_like(value, entropy[:, 0].numel())
    if open_rows is not None:
        spread = spread.masked_fill(~open_rows, -torch.inf)
        counted = open_rows[:, :, : entropy.shape[2]]
        entropy, rows = entropy.masked_fill(~counted, 0), counted.sum((0, 2)).float()
    return AttentionStatistics(value, value, spread.amax((0, 2)), entropy.sum((0, 2)), rows)


def _entropy(logits: Tensor, row_max: Tensor) -> Tensor:
    """``[..., n]`` from ``[..., n, S]``: with weights p, log(sum of exp) less the mean logit, both below the maximum.

    Several times cheaper than summing -p log p. What is cut off has no weight that fp32 could hold.
    """
    weights = logits.softmax(-1)
    below = (row_max[..., None] - logits).clamp_(max=100)
    return (weights * below).sum(-1) - weights.amax(-1).log()


def _join(parts: list[AttentionStatistics]) -> AttentionStatistics:
    first, *others = parts
    for part in others:
        value = torch.maximum(first.max_logit, part.max_logit)
        first = AttentionStatistics(
            value,
            value,
            torch.maximum(first.logit_range, part.logit_range),
            first.entropy_sum + part.entropy_sum,
            first.entropy_rows + part.entropy_rows,
        )
    return first


def _nothing(heads: int, device: torch.device) -> AttentionStatistics:
    """Of a call without rows or without keys."""
    low, zero = torch.full((heads,), -torch.inf, device=device), torch.zeros(heads, device=device)
    return AttentionStatistics(low, low, low, zero, zero)
