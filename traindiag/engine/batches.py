"""What a batch is called, so that the one that did it can be found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

LONGEST = 400
"""Characters of a label; it is in the record of every step."""

BatchId = Callable[[Any], Any]


def name_batch(batch: object, place: str, batch_id: BatchId | None, on_fault: Callable[[Exception], None]) -> str:
    """Place and ids of a batch in one line; what is too long ends in an ellipsis.

    Args:
        batch: The batch.
        place: Where it stands in the data.
        batch_id: Gives the ids of its samples; None for none. Tensors should be on the host: others are waited for.
        on_fault: Told where ``batch_id`` raises.

    Example:
        >>> import torch
        >>> name_batch({"id": torch.tensor([7, 3])}, "epoch 0, batch 2", lambda batch: batch["id"], print)
        'epoch 0, batch 2: [7, 3]'
    """
    if batch_id is None:
        return place
    try:
        ids = batch_id(batch)
        text = " ".join(str(ids.tolist() if isinstance(ids, Tensor) else ids).split())
    except Exception as error:
        on_fault(error)
        return place
    label = f"{place}: {text}" if place else text
    return label if len(label) <= LONGEST else label[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
