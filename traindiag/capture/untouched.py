"""Whole training steps of our own that leave no trace in a model and its optimizers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from traindiag.capture.sandbox import sandbox

_PLAIN = (bool, int, float, complex, str, bytes, Tensor, type(None))


@contextmanager
def untouched(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Runs its body, training steps included, with gradients on; puts everything back bit for bit, however it ends.

    Parameters are copied to the host and back, which costs no memory on an accelerator. Gradients and optimizer
    states are not copied back but set aside: the body works with a copy of the state and without gradients. Buffers,
    modes, random states and plain attributes of modules and optimizers are put back; lists and other objects that
    they change in place are not.

    Args:
        modules: Models that the body calls.
        optimizers: Optimizers that it steps.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer, before = torch.optim.Adam(net.parameters()), net.weight.clone()
        >>> with untouched([net], [optimizer]):
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     _ = optimizer.step()
        >>> torch.equal(before, net.weight), net.weight.grad, len(optimizer.state)
        (True, None, 0)
    """
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    parameters = list({id(p): p for p in [*(p for m in modules for p in m.parameters()), *owned]}.values())
    every = list({id(m): m for root in modules for m in root.modules()}.values())
    values = [(p, p.detach().to("cpu", copy=True), p.grad, p.requires_grad) for p in parameters]
    registered: list[dict[str, Any]] = [t for m in every for t in (m._parameters, m._buffers, m._modules)]
    tables = [(table, dict(table)) for table in registered]
    attributes = [(obj, dict(vars(obj))) for obj in (*every, *optimizers)]
    states = [(o, o.state, o.param_groups) for o in optimizers]
    try:
        with sandbox(modules), torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
            for optimizer in optimizers:
                memo = {id(p): p for p in parameters}
                optimizer.state = defaultdict(dict, {p: copy.deepcopy(s, memo) for p, s in optimizer.state.items()})
                optimizer.param_groups = [_copied(group) for group in optimizer.param_groups]
            yield
    finally:
        for optimizer, state, groups in states:
            optimizer.state, optimizer.param_groups = state, groups
        for obj, before in attributes:
            _put_back(obj, before)
        for table, held in tables:
            table.clear()
            table.update(held)
        with torch.no_grad():
            for parameter, value, gradient, asks in values:
                parameter.requires_grad_(asks)
                parameter.copy_(value)
                parameter.grad = gradient


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}


def _put_back(obj: Any, before: dict[str, Any]) -> None:
    now = vars(obj)
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if isinstance(value, _PLAIN):
            now[name] = value
