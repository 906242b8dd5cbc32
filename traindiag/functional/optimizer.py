"""What an optimizer did, measured on a fixed sample of the scalars of each tensor.

Samples of several tensors travel as one *flat* vector, the samples end to end, so that a statistic of all of them
costs a handful of operations whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SAMPLE = 4096
"""Scalars looked at per tensor: the root mean square of a tensor is then off by 2.2 % at most in our measurements."""

_TINY = torch.finfo(torch.float32).tiny


@lru_cache(maxsize=65536)
def stride_of(numel: int, limit: int = SAMPLE) -> int:
    """Distance between sampled scalars: the smallest that leaves at most ``limit`` and has no factor in common with
    the size, so that the sample is spread over every axis and does not run down one column.

    Example:
        >>> stride_of(256 * 64), stride_of(4000)
        (5, 1)
    """
    stride = max(1, -(-numel // limit))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, complex numbers as pairs."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def strided(tensor: Tensor, limit: int = SAMPLE) -> Tensor:
    """The same scalars of a tensor every time: every ``stride_of``-th in logical order, whatever its memory layout.

    Args:
        tensor: Any shape; the local part where it is sharded.
        limit: Largest number of scalars.

    Returns:
        ``[<= limit]``, a view where that is possible without a copy of the whole.

    Example:
        >>> strided(torch.arange(10.0).reshape(2, 5), limit=4)
        tensor([0., 3., 6., 9.])
    """
    tensor = local_part(tensor)
    stride = stride_of(tensor.numel(), limit)
    if stride == 1:
        return tensor.reshape(-1)
    if tensor.is_contiguous():
        return tensor.as_strided((-(-tensor.numel() // stride),), (stride,))
    return torch.take(tensor, torch.arange(0, tensor.numel(), stride, device=tensor.device))


def segment_squares(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum of squares of each part of a flat vector.

    Args:
        flat: ``[sum(sizes)]``.
        sizes: Lengths of the parts.

    Returns:
        ``[len(sizes)]``, float64 (float32 on Metal).

    Example:
        >>> segment_squares(torch.tensor([3.0, 4.0, 2.0]), [2, 1]).tolist()
        [25.0, 4.0]
    """
    found = torch.stack(torch._foreach_norm(torch.split(flat, list(sizes))))
    return (found if found.device.type == "mps" else found.double()).square()


def segment_counts(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """How many of each part of a flat vector are true.

    Args:
        flags: bool ``[sum(sizes)]``.
        sizes: Lengths of the parts.

    Returns:
        ``[len(sizes)]``, whole numbers in float32.

    Example:
        >>> segment_counts(torch.tensor([True, True, False]), [2, 1])
        tensor([2., 0.])
    """
    return torch.stack(torch._foreach_norm(torch.split(flags.float(), list(sizes)), 1))


def bias_correction(beta2: float | Tensor, step: float | Tensor) -> float | Tensor:
    """``1 - beta2 ** step``, without cancellation where ``beta2`` is close to one; a tensor where either is one.

    Example:
        >>> bias_correction(0.5, 2), bias_correction(torch.tensor(0.5), 2)
        (0.75, tensor(0.7500))
    """
    if isinstance(beta2, Tensor) or isinstance(step, Tensor):
        return -torch.expm1(step * torch.log(torch.as_tensor(beta2)))
    return -math.expm1(step * math.log(beta2)) if beta2 > 0 else 1.0


def rms_t_squares(
    gradient: Tensor,
    second_moment: Tensor,
    sizes: Sequence[int],
    *,
    eps: float | Tensor,
    correction: float | Tensor = 1.0,
) -> Tensor:
    """Sum over each part of ``g^2 / max(v / correction, eps^2)``: the root of its mean is RMS_t.

    Args:
        gradient: ``[sum(sizes)]``, as the optimizer used it.
        second_moment: ``[sum(sizes)]``, after the update and before bias correction.
        sizes: Lengths of the parts.
        eps: What the optimizer adds to the root of the second moment; one number, or ``[len(sizes)]``.
        correction: What it divides the second moment by; likewise. 1 where it corrects nothing.

    Returns:
        ``[len(sizes)]``.
    """
    # max(v / c, eps^2) = max(v, c eps^2) / c; the floor keeps 0 / 0 of scalars that never had a gradient at 0
    least = eps * eps * correction
    if isinstance(least, Tensor):
        least = least.clamp_min(_TINY).to(second_moment.dtype)
        floors = torch.cat([part.expand(size) for part, size in zip(least.unbind(), sizes)])
        root = torch.maximum(second_moment, floors).sqrt_()
    else:
        root = second_moment.clamp_min(max(least, _TINY)).sqrt_()
    return segment_squares(gradient / root, sizes) * correction


def rms_t(gradient: Tensor, second_moment: Tensor, *, eps: float, correction: float = 1.0) -> Tensor:
    """``sqrt(mean(g^2 / max(v, eps^2)))`` of one tensor (Wortsman et al. 2023, arXiv 2304.13013).

    About 1 while the second moment keeps up with the gradient; above it when the gradient has outgrown it, which
    preceded loss spikes by 1 to 8 steps there. It cannot exceed :func:`rms_t_ceiling`.

    Args:
        gradient: As the optimizer used it.
        second_moment: The same shape, after the update and before bias correction.
        eps: What the optimizer adds to the root of the second moment.
        correction: What it divides the second moment by.

    Example:
        >>> round(rms_t(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), eps=1e-8).item(), 4)  # sqrt((4 + 0) / 2)
        1.4142
    """
    flat = gradient.reshape(-1), second_moment.reshape(-1)
    total = rms_t_squares(*flat, [gradient.numel()], eps=eps, correction=correction)
    return total.div(gradient.numel()).sqrt()[0]


def rms_t_ceiling(beta2: float) -> float:
    """The largest RMS_t there can be once bias correction has faded: all of the second moment is one new gradient.

    Raises:
        ValueError: If ``beta2`` is not in [0, 1).

    Example:
        >>> round(rms_t_ceiling(0.95), 2), round(rms_t_ceiling(0.999), 1)
        (4.47, 31.6)
    """
    if not 0 <= beta2 < 1:
        raise ValueError(f"beta2 must be at least 0 and below 1, got {beta2}")
    return 1 / math.sqrt(1 - beta2)
