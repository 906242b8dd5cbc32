"""The state of a run in a file of its own, for trainers whose checkpoints have no place for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from traindiag.transfer.ranks import rank, world_size

STATE_FILE = "traindiag.pt"


def write_state(state: Mapping[str, Any], checkpoint: str | os.PathLike[str]) -> None:
    """Puts ``Diagnostics.state_dict()`` into a checkpoint's folder, whole or not at all; only the first rank writes.

    Raises:
        OSError: If it cannot be written.
    """
    if rank() != 0:
        return
    path = Path(checkpoint) / STATE_FILE
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save(dict(state), unfinished)
    except RuntimeError as error:  # how torch tells a folder that is gone
        raise OSError(str(error)) from error
    os.replace(unfinished, path)


def read_state(checkpoint: str | os.PathLike[str]) -> tuple[Mapping[str, Any] | None, str]:
    """The state in a checkpoint's folder, or None and the reason, in words.

    The first rank reads and all get what it found: ranks with different states would sample different steps.

    Example:
        >>> read_state("/no/such/checkpoint-10")
        (None, '/no/such/checkpoint-10/traindiag.pt does not exist')
    """
    found: list[tuple[Mapping[str, Any] | None, str]] = [(None, "")]
    if rank() == 0:
        found = [_read(Path(checkpoint) / STATE_FILE)]
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _read(path: Path) -> tuple[Mapping[str, Any] | None, str]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None, f"{path} does not exist"
    except Exception as error:  # a damaged file may fail in any way
        return None, f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]:.200}"
    if not isinstance(state, dict):
        return None, f"{path} was expected to hold a dict, got {type(state).__name__}"
    return state, ""
