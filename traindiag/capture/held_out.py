"""Held-out samples that stay the same for a whole run, taken from a user's loader without a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from traindiag.capture.sandbox import sandbox

CHUNK = 32
"""Samples a batch where a loader does not say."""


class HeldOut:
    """Batches of up to ``samples`` samples, drawn once and kept on the host.

    Of a loader over a data set with indices they are drawn evenly, with a generator of our own; of any other one
    they are the first. Random states are put back, those of the loader included.

    A running minimum over samples that are drawn anew each time is biased low: by .03 after 1,000 evaluations of
    1,000 samples at an accuracy of .9. So they are fixed.

    Args:
        name: What they are called in errors.
        loader: A ``DataLoader``, or any iterable of batches.
        samples: How many, at most (a batch is not split where the loader has no indices).
        seed: Of the draw.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(100.0))
        >>> held_out = HeldOut("old", DataLoader(data, batch_size=4), samples=6, seed=0)
        >>> [len(batch[0]) for batch in held_out.batches], held_out.digest == HeldOut(
        ...     "old", DataLoader(data, batch_size=4, shuffle=True), samples=6, seed=0).digest
        ([4, 2], True)
    """

    def __init__(self, name: str, loader: Iterable[Any], samples: int, seed: int) -> None:
        with sandbox([]):
            self.batches: list[Any] = list(_drawn(loader, samples, seed))
        if not self.batches:
            raise ValueError(f"the loader of task {name!r} holds no batch; expected held-out samples of the task")
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in tensors_of(batch):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.digest = digest.hexdigest()[:16]
        """Of all tensors in them: equal for the same samples."""


def _drawn(loader: Iterable[Any], samples: int, seed: int) -> Iterator[Any]:
    if (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None  # otherwise each item is a batch already
        and not isinstance(loader.dataset, IterableDataset)
    ):
        data: Any = loader.dataset
        generator = torch.Generator().manual_seed(seed)
        chosen = sorted(torch.randperm(len(data), generator=generator)[:samples].tolist())
        size = loader.batch_size or CHUNK
        for first in range(0, len(chosen), size):
            yield loader.collate_fn([data[i] for i in chosen[first : first + size]])
        return
    own = getattr(loader, "generator", None)
    before = own.get_state() if isinstance(own, torch.Generator) else None
    try:
        taken = 0
        for batch in loader:
            yield batch
            taken += size_of(batch)
            if taken >= samples:
                break
    finally:
        if before is not None:
            assert own is not None
            own.set_state(before)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a nested batch, in order.

    Example:
        >>> [t.tolist() for t in tensors_of({"x": torch.ones(1), "y": [torch.zeros(1), "text"]})]
        [[1.0], [0.0]]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for value in batch:
            yield from tensors_of(value)


def size_of(batch: Any) -> int:
    """Samples of a batch: the first length of its first tensor, 1 where it has none."""
    first = next(tensors_of(batch), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def on_device(batch: Any, device: torch.device) -> Any:
    """A nested batch with its tensors on ``device``; containers keep their kind.

    Example:
        >>> on_device({"x": [torch.ones(2), "text"]}, torch.device("cpu"))
        {'x': [tensor([1., 1.]), 'text']}
    """
    if isinstance(batch, Tensor) or (not isinstance(batch, Mapping) and hasattr(batch, "to")):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: on_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(on_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(on_device(value, device) for value in batch)
    return batch
