"""Real text that every machine with Python has: the source of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

VALIDATION_EVERY = 10
"""Each tenth file is held out, so that the two parts share no file."""


def standard_library(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8 ``[bytes]`` each, the same order on every call.

    Top-level modules only: that leaves tests and installed packages out. The build settings (``_sysconfigdata*``)
    are generated for one machine, so they are left out too.

    Raises:
        FileNotFoundError: If this Python came without its sources.

    Example:
        >>> train, validation = standard_library()
        >>> train.dtype, len(train) > 8 * len(validation) / 2 > 10_000
        (torch.uint8, True)
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = sorted(f for f in root.glob("*.py") if not f.name.startswith("_sysconfigdata"))
    if len(files) < VALIDATION_EVERY:
        raise FileNotFoundError(
            f"expected the sources of the standard library in {root}, found {len(files)} .py files; "
            "the demo needs a Python installed with its sources"
        )
    held_out = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return _read(f for f in files if f not in held_out), _read(held_out)


def _read(files: Iterable[Path]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).copy())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """``count`` windows of ``length + 1`` bytes at places drawn from ``seed``, as inputs and targets.

    Example:
        >>> inputs, targets = Windows(torch.arange(9, dtype=torch.uint8), count=3, length=4, seed=0)[1]
        >>> (targets - inputs).tolist()
        [1, 1, 1, 1]
    """

    def __init__(self, text: Tensor, count: int, length: int, seed: int) -> None:
        if len(text) <= length:
            raise ValueError(f"windows of {length} bytes need a text longer than that, got {len(text)} bytes")
        self.text = text
        self.length = length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.text[start : start + self.length + 1].long()
        return window[:-1], window[1:]
