"""Where forward passes of our own run without a trace in the run: same random state, same buffers, no gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def sandbox(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Runs its body without gradients; random states, buffers and training modes are put back afterwards.

    Python attributes that a forward pass changes are not put back.

    Args:
        modules: Models that the body may call.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
        >>> before = torch.get_rng_state()
        >>> with sandbox([net]):
        ...     _ = net(torch.ones(3, 2))
        >>> net[0].num_batches_tracked.item(), net[0].running_mean.tolist()
        (0, [0.0, 0.0])
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    copies = [(b, b.detach().clone()) for b in buffers]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    devices = sorted({p.get_device() for module in modules for p in module.parameters() if p.is_cuda})
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            for buffer, copy in copies:
                # All of them: batch norm moves its statistics without counting their version up. Through .data,
                # which does not either: writing to one that autograd has saved would break its backward pass.
                buffer.data.copy_(copy)
            for module, mode in modes:
                module.training = mode
