"""Norms of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_PLAIN = {(Tensor, torch.float32, torch.strided)}


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, of the local shard where it is sharded.

    Half precision is accumulated in float32, in which a norm above 65504 does not overflow. A NaN or an infinity
    in a tensor makes its own entry non-finite and no other.

    Args:
        tensors: Any shapes; sparse and distributed ones too.

    Returns:
        ``[len(tensors)]`` on the device of the first tensor, float32, or float64 where a tensor is; empty for none.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor([5., 2.])
    """
    if not tensors:
        return torch.zeros(0)
    if {(type(t), t.dtype, t.layout) for t in tensors} == _PLAIN:
        found = torch._foreach_norm(list(tensors))
    else:
        local = [_local(t) for t in tensors]
        wide = torch.float64 if any(t.dtype is torch.float64 for t in local) else torch.float32
        found = torch._foreach_norm(local, dtype=wide)
    try:
        return torch.stack(found)
    except RuntimeError:  # parameters on several devices
        return torch.stack([n.to(found[0].device, non_blocking=True) for n in found])


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def replicas(tensor: Tensor, world_size: int) -> int:
    """How many ranks hold the same data: what a sum over all ranks counts too often.

    A plain tensor is taken as replicated everywhere (data parallel). Of a distributed one only ``Replicate`` is
    tested for, because other placements, strided shards among them, all mean that the data is split. A flat parameter
    of ``FullyShardedDataParallel`` is split as its sizes say; it is recognised by its attributes, without an import.

    Raises:
        NotImplementedError: For a slice that stands for an original parameter (``use_orig_params=True``): ranks
            without a part of it have no gradient, which cannot be told from one that is missing.

    Example:
        >>> replicas(torch.ones(2), world_size=8)
        8
    """
    if not isinstance(tensor, DTensor):
        return _flat_replicas(tensor, world_size) if hasattr(tensor, "_fsdp_flattened") else world_size
    mesh = tensor.device_mesh
    same = world_size // mesh.size()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            same *= mesh.size(dimension)
    return same


def _flat_replicas(tensor: Tensor, world_size: int) -> int:
    whole, part = getattr(tensor, "_unpadded_unsharded_size", None), getattr(tensor, "_sharded_size", None)
    if whole is None or part is None:
        raise NotImplementedError(
            "norms of parameters that FullyShardedDataParallel has split with use_orig_params=True are not measured; "
            "use_orig_params=False and fully_shard are"
        )
    counts = (n for n in range(world_size, 0, -1) if world_size % n == 0)
    return world_size // next(n for n in counts if -(-whole.numel() // n) == part.numel())
