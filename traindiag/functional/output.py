"""What output logits say: log Z, its square, their level, and how far the target stands out.

All of it from a bounded number of tokens, because a pass over the logits of a large vocabulary costs about as much
as the loss itself (a log-sum-exp of all of them: a seventh of head and loss, forward and backward).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**22
"""Logits held at a time: 16 MiB in fp32, whatever the size of the vocabulary."""

_GOLDEN = 40503
"""Golden ratio in 16 binary digits: its multiples, modulo one, fill an interval evenly in any order of magnitude."""


class OutputStatistics(NamedTuple):
    """States of one call, each 0-d fp32 on the device of the logits; they add up, or the larger one wins.

    Args:
        tokens: Number of tokens in the sums: those looked at that are not ignored.
        log_z_sum: Sum over tokens of ``log Z = log sum_c exp(logit_c)``.
        log_z_square_sum: Sum over tokens of its square.
        logit_mean_sum: Sum over tokens of the mean of their logits.
        target_z_sum: Sum over tokens of ``(target logit - mean) / std`` of their logits.
        target_z_tokens: Number of tokens in that sum: those with a target whose logits are not all equal.
        overconfidence_sum: Sum over tokens of ``-log p_target - H(p)``, with ``H`` the entropy in nats.
        target_tokens: Number of tokens in that sum: those with a target.
        log_z_max_abs: Largest ``|log Z|``; ``-inf`` where no token counts.
        logit_max: Largest logit; ``-inf`` where no token counts.
        logit_max_negated: Largest ``-logit``, the smallest logit with its sign turned.
    """

    tokens: Tensor
    log_z_sum: Tensor
    log_z_square_sum: Tensor
    logit_mean_sum: Tensor
    target_z_sum: Tensor
    target_z_tokens: Tensor
    overconfidence_sum: Tensor
    target_tokens: Tensor
    log_z_max_abs: Tensor
    logit_max: Tensor
    logit_max_negated: Tensor


def output_statistics(
    logits: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100, tokens: int = 128
) -> OutputStatistics:
    """Statistics of the logits of up to ``tokens`` tokens, evenly spaced over those that count.

    Reads nothing back to the host, draws no random number and does not branch on values, so it can be traced into a
    compiled graph. NaN or infinity in a logit that is looked at shows in the states.

    Args:
        logits: ``[..., classes]``, any floating dtype, any strides; computed on in fp32.
        targets: Class indices ``[...]``, or None where they are not known.
        ignore_index: Tokens with this target do not count.
        tokens: Number of tokens looked at, at most.

    Raises:
        ValueError: If shapes do not fit, targets are no integers, logits are no floating numbers, or ``tokens`` is
            below 1.

    References:
        Wortsman et al. 2023, arXiv 2309.14322 section 3.1.2 (log Z).

    Example:
        >>> s = output_statistics(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([-100, 0]))
        >>> s.tokens.item(), s.logit_max.item(), s.target_z_sum.item()
        (1.0, 3.0, 1.0)
    """
    _check(logits, targets)
    classes = logits.shape[-1]

    def of_tokens(index: Tensor) -> Tensor:
        if logits.is_contiguous():
            return logits.view(-1, classes).index_select(0, index)
        return logits[_unravel(index, logits.shape[:-1])]  # flattening a transposed view would copy all of it

    return _statistics(of_tokens, logits.shape, logits.device, targets, ignore_index, tokens)


def linear_output_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    tokens: int = 128,
    scale: float = 1.0,
    softcap: float | None = None,
) -> OutputStatistics:
    """Statistics of ``hidden @ weight^T + bias``, of which only the tokens looked at are computed.

    Args:
        hidden: ``[..., features]``.
        weight: ``[classes, features]``.
        targets: As in :func:`output_statistics`.
        bias: ``[classes]``, or None.
        ignore_index: As in :func:`output_statistics`.
        tokens: As in :func:`output_statistics`.
        scale: The logits are these times it.
        softcap: And then ``softcap * tanh(logits / softcap)``, where it is given.

    Raises:
        ValueError: As in :func:`output_statistics`.

    Example:
        >>> s = linear_output_statistics(torch.ones(2, 3), torch.ones(5, 3))
        >>> s.logit_max.item(), s.tokens.item()
        (3.0, 2.0)
    """
    _check(hidden, targets)

    def of_tokens(index: Tensor) -> Tensor:
        rows = hidden[_unravel(index, hidden.shape[:-1])].to(weight.dtype)
        logits = torch.nn.functional.linear(rows, weight, bias)
        logits = logits if scale == 1.0 else logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    shape = torch.Size((*hidden.shape[:-1], len(weight)))
    return _statistics(of_tokens, shape, hidden.device, targets, ignore_index, tokens)


def choose_tokens(
    hidden: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100, tokens: int = 128
) -> tuple[Tensor, Tensor | None]:
    """Hidden states and targets of the tokens that :func:`linear_output_statistics` would look at: copies, to keep.

    Args:
        hidden: ``[..., features]``.
        targets: As in :func:`output_statistics`.
        ignore_index: As in :func:`output_statistics`.
        tokens: As in :func:`output_statistics`.

    Returns:
        ``[n, features]``, and ``[n]`` or None; what does not count has ``ignore_index`` as its target.

    Raises:
        ValueError: As in :func:`output_statistics`.

    Example:
        >>> targets = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
        >>> rows, of_rows = choose_tokens(torch.ones(2, 3, 4), targets, tokens=4)
        >>> rows.shape, of_rows.tolist()
        (torch.Size([4, 4]), [5, 6, 7, -100])
    """
    _check(hidden, targets)
    with torch.no_grad():
        valid = None if targets is None else targets.flatten() != ignore_index
        index, counted = _choose(hidden.shape[:-1].numel(), valid, tokens, hidden.device)
        of_rows = None if targets is None else targets.flatten()[index].where(counted, ignore_index)
        return hidden[_unravel(index, hidden.shape[:-1])], of_rows


def _statistics(
    logits_of: Callable[[Tensor], Tensor],
    shape: torch.Size,
    device: torch.device,
    targets: Tensor | None,
    ignore_index: int,
    tokens: int,
) -> OutputStatistics:
    """Of logits of ``shape``, which ``logits_of`` gives for flat indices of tokens as ``[n, classes]``."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    count, classes = shape[:-1].numel(), shape[-1]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if not (count and classes):
            return _nothing(device)
        valid = None if targets is None else targets.flatten() != ignore_index
        index, counted = _choose(count, valid, tokens, device)
        target = None if targets is None else targets.flatten()[index].clamp(0, classes - 1)
        block = max(1, _BLOCK // classes)
        parts = [
            _of_tokens(logits_of(index[i : i + block]).float(), None if target is None else target[i : i + block])
            for i in range(0, len(index), block)
        ]
        log_z, mean, score, scored, excess, largest, negated = (torch.cat(part) for part in zip(*parts))
        aimed = counted if target is not None else torch.zeros_like(counted)
        return OutputStatistics(
            counted.sum().float(),
            _sum(log_z, counted),
            _sum(log_z.square(), counted),
            _sum(mean, counted),
            _sum(score, counted & scored),
            (counted & scored).sum().float(),
            _sum(excess, aimed),
            aimed.sum().float(),
            _largest(log_z.abs(), counted),
            _largest(largest, counted),
            _largest(negated, counted),
        )


def z_loss(logits: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
    """Mean of ``(log Z)**2``, differentiable: a penalty that keeps output logits from drifting away.

    Add it to the loss with weight 1e-4: ``loss + 1e-4 * z_loss(logits, targets)``.

    Args:
        logits: ``[..., classes]``; computed on in fp32.
        targets: Class indices ``[...]``; None counts every token.
        ignore_index: Tokens with this target do not count.

    Returns:
        0-d, fp32; zero where no token counts.

    Raises:
        ValueError: If shapes do not fit or dtypes are wrong.

    References:
        Wortsman et al. 2023, arXiv 2309.14322 section 3.1.2; Chowdhery et al. 2022, arXiv 2204.02311 section 5.

    Example:
        >>> round(z_loss(torch.zeros(2, 4)).item(), 4)  # log(4)**2
        1.9218
    """
    _check(logits, targets)
    with torch.autocast(logits.device.type, enabled=False):
        square = logits.float().logsumexp(-1).square()
        if targets is None:
            return square.sum() / max(square.numel(), 1)
        valid = targets != ignore_index
        return square.where(valid, 0).sum() / valid.sum().clamp(min=1)


def _check(logits: Tensor, targets: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating numbers, got {logits.dtype}")
    if not logits.ndim:
        raise ValueError("expected logits of shape [..., classes], got a single number")
    if targets is None:
        return
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be class indices, got {targets.dtype}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}")


def _choose(count: int, valid: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices of the tokens to look at, and whether each of them counts."""
    number = torch.arange(min(count, tokens), device=device)
    everyone = torch.ones_like(number, dtype=torch.bool)
    if count <= tokens:
        return number, everyone if valid is None else valid
    if valid is None:
        return _spread(number, count, tokens), everyone
    counted_so_far = valid.cumsum(0)
    total = counted_so_far[-1]
    rank = torch.where(total > tokens, _spread(number, total, tokens), number)
    return torch.searchsorted(counted_so_far, rank + 1).clamp(max=count - 1), number < total


def _spread(number: Tensor, total: Tensor | int, tokens: int) -> Tensor:
    """One of each of ``tokens`` equal parts of ``range(total)``, at a place that no period of the data follows: with
    a constant stride every token could stand at the same place of its sequence.
    """
    first, behind = number * total // tokens, (number + 1) * total // tokens
    return first + ((number * _GOLDEN & 0xFFFF) * (behind - first) >> 16)


def _unravel(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for size in reversed(shape):
        found.insert(0, index % size)
        index = index // size
    return tuple(found)


def _of_tokens(logits: Tensor, target: Tensor | None) -> tuple[Tensor, ...]:
    """Log Z, mean, target z-score, whether it has one, overconfidence, extremes; each ``[n]``."""
    # one pass each: aminmax and var_mean along an axis take ten times as long on a CPU
    smallest, largest, mean = logits.amin(-1), logits.amax(-1), logits.mean(-1)
    log_z = logits.logsumexp(-1)
    if target is None:
        score, scored, excess = (
            torch.zeros_like(mean),
            torch.zeros_like(mean, dtype=torch.bool),
            torch.zeros_like(mean),
        )
    else:
        centred = logits - mean[:, None]
        std = torch.linalg.vector_norm(centred, dim=-1) / logits.shape[-1] ** 0.5
        score = centred.gather(-1, target[:, None])[:, 0] / std
        log_p = logits - log_z[:, None]
        share = log_p.exp()
        # a class that is ruled out adds nothing: the limit of p log p, which in floating point is a NaN
        excess = (share * log_p).masked_fill_(share == 0, 0).sum(-1) - log_p.gather(-1, target[:, None])[:, 0]
        scored = smallest != largest  # a head that starts at zero has none; NaN differs from itself and stays
    return log_z, mean, score, scored, excess, largest, -smallest


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, 0).sum()


def _largest(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, -torch.inf).amax()


def _nothing(device: torch.device) -> OutputStatistics:
    """Of a call without tokens."""
    zero, low = torch.zeros((), device=device), torch.full((), -torch.inf, device=device)
    return OutputStatistics(*[zero] * 8, *[low] * 3)
