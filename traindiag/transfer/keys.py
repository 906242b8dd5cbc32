"""Order-preserving integer keys: a MAX over ranks that keeps NaN and names the rank that won.

A collective MAX over floats may drop a NaN (gloo keeps or loses it by rank order). Integers have no such gap: the
high 32 bits of a key are the float's bits in an order where NaN stands above infinity, the low 32 bits prefer the
lowest rank among equals.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNSEEN = torch.iinfo(torch.int64).min
_LOW = 0x7FFFFFFF
_NAN = 0x7FFFFFFF


def encode(values: Tensor, rank: int) -> Tensor:
    """Keys of float32 ``values`` measured on ``rank``; int64, same shape.

    Example:
        >>> keys = encode(torch.tensor([-1.0, 2.0, float("nan"), float("inf")]), rank=0)
        >>> keys.argsort().tolist()
        [0, 1, 3, 2]
    """
    bits = values.float().contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & _LOW)  # negative floats sort backwards as integers: flip them
    ordered = torch.where(values.isnan(), _NAN, ordered)
    return (ordered.long() << 32) | (_LOW - rank)


def decode(keys: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Values and ranks of reduced keys. An unseen key gives NaN and rank -1.

    Returns:
        float32 values and int64 ranks, same shape as ``keys``.

    Example:
        >>> values, ranks = decode(encode(torch.tensor([3.5, -0.25]), rank=2).numpy())
        >>> values.tolist(), ranks.tolist()
        ([3.5, -0.25], [2, 2])
    """
    ordered = (keys >> 32).astype(np.int32)
    bits = ordered ^ ((ordered >> 31) & np.int32(_LOW))
    values = bits.view(np.float32).copy()
    values[ordered == _NAN] = np.nan
    ranks = _LOW - (keys & 0xFFFFFFFF)
    unseen = keys == UNSEEN
    values[unseen] = np.nan
    ranks[unseen] = -1
    return values, ranks
