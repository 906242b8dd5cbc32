"""Norms of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norm of each tensor, of the local shard where it is sharded.

    Half precision is accumulated in float32, in which a norm above 65504 does not overflow. A NaN or an infinity
    in a tensor makes its own entry non-finite and no other.

    Args:
        tensors: Any shapes; sparse and distributed ones too.

    Returns:
        float64 ``[len(tensors)]`` (float32 on Metal) on the device of the first tensor; empty for no tensors.

    Example:
        >>> squared_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor([25.,  4.], dtype=torch.float64)
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    local = [_local(t) for t in tensors]
    device = local[0].device
    norms = torch._foreach_norm(local, dtype=_accumulator(local))
    wide = torch.float32 if device.type == "mps" else torch.float64
    if any(n.device != device for n in norms):
        norms = tuple(n.to(device, non_blocking=True) for n in norms)
    return torch.stack(norms).to(wide).square_()


def _local(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and not tensor.is_sparse:
        return tensor
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _accumulator(tensors: Sequence[Tensor]) -> torch.dtype | None:
    dtypes = {t.dtype for t in tensors}
    if dtypes <= {torch.float32, torch.float64}:
        return None
    return torch.float64 if torch.float64 in dtypes else torch.float32


def replicas(tensor: Tensor, world_size: int) -> int:
    """How many ranks hold the same data: what a sum over all ranks counts too often.

    A plain tensor is taken as replicated everywhere (data parallel). Only ``Replicate`` is tested for, because other
    placements, strided shards among them, all mean that the data is split.

    Example:
        >>> replicas(torch.ones(2), world_size=8)
        8
    """
    if not isinstance(tensor, DTensor):
        return world_size
    mesh = tensor.device_mesh
    same = world_size // mesh.size()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            same *= mesh.size(dimension)
    return same
