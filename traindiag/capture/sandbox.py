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
    """Runs its body without gradients, on copies of buffers; puts random states and training modes back afterwards.

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
    places = [(m, name, b) for module in modules for m in module.modules() for name, b in m._buffers.items()]
    copies = {id(b): b.clone() for _, _, b in places if b is not None}
    modes = [(m, m.training) for module in modules for m in module.modules()]
    devices = sorted({p.get_device() for module in modules for p in module.parameters() if p.is_cuda})
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module, name, buffer in places:
                # stand-ins, because what autograd has saved of the originals must not be written to, not even back
                module._buffers[name] = None if buffer is None else copies[id(buffer)]
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            for module, name, buffer in places:
                module._buffers[name] = buffer
            for module, mode in modes:
                module.training = mode
