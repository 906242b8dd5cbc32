"""What a batch tells of itself, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def batch_size(batch: Any) -> int | None:
    """Length of the first tensor's first axis; None where there is no tensor.

    Example:
        >>> import torch
        >>> batch_size({"text": ["a", "b"], "labels": torch.zeros(2, 8)})
        2
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := batch_size(part)) is not None), None)
