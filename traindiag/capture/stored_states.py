"""Inputs of a module, kept to call it with them again: a bounded number of states, and what else it was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from traindiag.capture.hidden_layers import tensors_of

MAX_BYTES = 2**26
"""A set takes 64 MiB at most, whatever the size of a state."""

_PLAIN = (bool, int, float, str, type(None))

Call = tuple[tuple[Any, ...], dict[str, Any]]


class StoredStates:
    """Up to ``limit`` states, each a row of every tensor that a module was called with.

    Args:
        limit: Number of states.

    Example:
        >>> states = StoredStates(3)
        >>> states.take((torch.zeros(2, 4), True), {}, rows=2)
        >>> states.take((torch.ones(2, 4), True), {}, rows=2)
        >>> len(states), states.full, next(states.batches(8))[0][0].sum(1).tolist()
        (3, True, [0.0, 0.0, 4.0])
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._calls: list[Call] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= self.limit

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> None:
        """Keeps copies of at most ``rows`` evenly spaced rows of a call, on their device.

        Raises:
            TypeError: If the module was given something that is neither a tensor nor plain data.
            ValueError: If it was given no tensor with a dimension.
        """
        size = batch_size((args, kwargs))
        rows = min(rows, size, self.limit - self._count)
        if rows < 1:
            return
        step = size // rows
        kept = _each(lambda t: t.detach()[::step][:rows].clone(), (args, dict(kwargs)), size)
        if not self._calls:
            bytes_each = sum(t.numel() * t.element_size() for t in tensors_of(kept)) / rows
            self.limit = min(self.limit, max(1, int(MAX_BYTES / max(bytes_each, 1.0))))
        elif _form(kept) != _form(self._calls[0]):
            return  # called in another way, such as for one sample
        self._calls.append(kept)
        self._count += rows
        if self.full:
            self._calls = [self.joined()]

    def joined(self) -> Call:
        """All states as one call."""
        if len(self._calls) == 1:
            return self._calls[0]
        joined: Call = _join(self._calls)
        return joined

    def batches(self, size: int) -> Iterator[Call]:
        """All states in batches of at most ``size``."""
        if not self._count:
            return
        everything = self.joined()
        for start in range(0, self._count, size):
            part = slice(start, start + size)
            yield _each(itemgetter(part), everything, self._count)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors on the host."""
        if not self._count:
            return {}
        args, kwargs = _each(lambda t: t.cpu(), self.joined(), self._count)
        return {"count": self._count, "limit": self.limit, "args": list(args), "kwargs": kwargs}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replaces all states; an empty state leaves none."""
        self._calls, self._count = [], 0
        if state:
            call = (tuple(state["args"]), dict(state["kwargs"]))
            self._count, self.limit = int(state["count"]), int(state["limit"])
            self._calls = [_each(lambda t: t.to(device), call, self._count)]


def batch_size(call: object) -> int:
    """Rows of the first tensor with a dimension.

    Raises:
        ValueError: If there is none.
    """
    for tensor in tensors_of(call):
        if tensor.ndim:
            return len(tensor)
    raise ValueError("expected a tensor [states, ...] among the inputs, got none")


def _each(change: Callable[[Tensor], Tensor], value: Any, size: int) -> Any:
    """The same structure with every tensor of ``size`` rows changed."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == size else value.detach()
    if isinstance(value, Mapping):
        return {key: _each(change, part, size) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_each(change, part, size) for part in value)
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"its inputs hold a {type(value).__name__}, which cannot be kept; pass probe=")


def _form(value: Any) -> Any:
    """Structure, and what else must be alike for rows to be joined."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[1:]), value.dtype)
    if isinstance(value, Mapping):
        return {key: _form(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return value


def _join(calls: list[Any]) -> Any:
    first = calls[0]
    if isinstance(first, Tensor):
        return torch.cat(calls) if first.ndim else first
    if isinstance(first, Mapping):
        return {key: _join([c[key] for c in calls]) for key in first}
    if isinstance(first, tuple):
        return tuple(_join(list(parts)) for parts in zip(*calls))
    return first


def finite(call: object) -> bool:
    """Whether every floating-point tensor is finite. Waits for the device."""
    return all(math.isfinite(float(t.sum())) for t in tensors_of(call) if t.is_floating_point())
