"""Whether tensors are the same to the last bit, told by one number for each."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKSUM_BITS = 24
"""Whole numbers of this many bits are exact in float32, in which maxima travel."""

_ODD, _SPREAD = 0x9E3779B97F4A7C1, 0x5851F42D4C957F2D


@torch.no_grad()
def checksums(flat: Tensor, owner: Tensor, place: Tensor, parts: int) -> Tensor:
    """A hash of the bits of each part of a flat vector, equal wherever the bits are; different bits share one by a
    chance of 2^-24.

    Args:
        flat: ``[total]``; it is compared as float32.
        owner: int64 ``[total]``, the part that each number belongs to.
        place: int64 ``[total]``, its place in that part.
        parts: Number of parts.

    Returns:
        float32 ``[parts]``, whole numbers below 2^24.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0])
        >>> a, b, c = checksums(values, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1]), 3)
        >>> bool(a == b), bool(a == c)
        (True, False)
    """
    mixed = (flat.float().view(torch.int32).long() + place * _ODD) * _SPREAD  # wraps, on every device alike
    mixed = mixed ^ (mixed >> 32)
    total = torch.zeros(parts, dtype=torch.int64, device=flat.device).index_add_(0, owner, mixed)
    return total.bitwise_and(2**CHECKSUM_BITS - 1).float()
