"""Reads TensorBoard event files fast, and as far as a damaged one can be read."""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

_HEADER = struct.Struct("<QI")  # length of the payload and its checksum; payload and checksum follow
_FRAME = _HEADER.size + 4
TAIL = "incomplete: the run is being written or was killed"
# Where lengths fit into three bytes, the other five are zero: the candidates for a header in a damaged stretch.
_LIKELY_HEADER = re.compile(rb"(?=[\s\S]{3}\0{5})")


def event_files(path: str | os.PathLike[str]) -> list[Path]:
    """Every event file at or under ``path``, sorted.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"there is no log at {root}")
    if root.is_file():
        return [root]
    return sorted(Path(folder, n) for folder, _, names in os.walk(root) for n in names if "tfevents" in n)


def read_events(path: Path, problem: Callable[[str], None], verify: bool) -> Iterator[Event]:
    """Yields the events of one file.

    After a damaged stretch reading goes on at the next record whose header checksum holds.

    Args:
        path: The event file; it may still grow.
        problem: Told what was skipped.
        verify: Whether every checksum is verified, at 118 ns a byte in Python. Without it only damage to
            the structure is found.
    """
    size = path.stat().st_size
    if not size:  # cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < size:
            event, end = _record(data, at, size, verify)
            if event is not None:
                yield event
                at = end
                continue
            following = _next_record(data, at + 1, size)
            if following is None:
                problem(f"{path}: the last {size - at} bytes are {TAIL}")
                return
            problem(f"{path}: {following - at} damaged bytes at {at} skipped")
            at = following


def _record(data: mmap.mmap, at: int, size: int, verify: bool) -> tuple[Event | None, int]:
    if at + _FRAME > size:
        return None, size
    length, header_sum = _HEADER.unpack_from(data, at)
    end = at + _FRAME + length
    if end > size or (verify and masked_crc32c(data[at : at + 8]) != header_sum):
        return None, size
    payload = data[at + _HEADER.size : end - 4]
    if verify and masked_crc32c(payload) != int.from_bytes(data[end - 4 : end], "little"):
        return None, size
    try:
        return Event.FromString(payload), end
    except DecodeError:
        return None, size


def _next_record(data: mmap.mmap, start: int, size: int) -> int | None:
    for match in _LIKELY_HEADER.finditer(data, start):
        at = match.start()
        if at + _FRAME > size:
            return None
        length, checksum = _HEADER.unpack_from(data, at)
        if at + _FRAME + length <= size and masked_crc32c(data[at : at + 8]) == checksum:
            return at
    return None
