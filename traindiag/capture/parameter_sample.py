"""A fixed sample of an optimizer's parameters, and what one update did to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from traindiag.functional.gradient import replicas
from traindiag.functional.optimizer import SAMPLE, local_part, segment_counts, segment_squares, stride_of, strided
from traindiag.record.cells import Cells

AXES = ("optimizer", "parameter")


class ParameterSample:
    """The same scalars of each parameter at every step; large tensors by evenly spaced ones, small ones whole.

    To be used under ``no_grad``.

    Args:
        optimizer: Name of the optimizer.
        parameters: Its parameters with their names. What holds no numbers (sparse, quantised, not materialised) is
            left out.
        ranks: Number of ranks.
        limit: Largest number of scalars per parameter.
    """

    def __init__(
        self,
        optimizer: str,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        ranks: int = 1,
        limit: int = SAMPLE,
    ) -> None:
        kept = [(name, p) for name, p in parameters if can_sample(p)]
        self.cells = Cells(AXES, tuple((optimizer, name) for name, _ in kept))
        self.parameters = tuple(p for _, p in kept)
        self.limit = limit
        self._ranks = ranks
        self._group_count = 0
        self._group_of: list[int | None] = []
        self._columns: dict[tuple[float, ...], Tensor] = {}
        self._scalars: dict[tuple[bool, ...] | None, Tensor] = {}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sampled scalars of each parameter."""
        numels = [local_part(p).numel() for p in self.parameters]
        return tuple(-(-n // stride_of(n, self.limit)) for n in numels)

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The parameter group of each parameter; empty for one that the optimizer does not own.

        Groups are found anew when their number changes; they are replaced by equal ones when a checkpoint is loaded.
        """
        groups = optimizer.param_groups
        if len(groups) != self._group_count:
            where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            self._group_count, self._group_of = len(groups), [where.get(id(p)) for p in self.parameters]
        return [{} if i is None else groups[i] for i in self._group_of]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @cached_property
    def weights(self) -> Tensor:
        """``[n]``: what a sampled scalar stands for, so that sums over the sample and over ranks are sums over all.

        A sharded parameter adds up over ranks; what several ranks hold alike counts once.
        """
        numels = [local_part(p).numel() for p in self.parameters]
        shares = [n / max(1, size) for n, size in zip(numels, self.sizes)]
        return self.column([share / replicas(p, self._ranks) for share, p in zip(shares, self.parameters)])

    def scalars(self, of: Sequence[bool] | None = None) -> Tensor:
        """``[n]``: what the sampled scalars of each parameter stand for, 0 for those that ``of`` leaves out."""
        key = None if of is None or all(of) else tuple(of)
        if key not in self._scalars:
            if len(self._scalars) >= 16:
                self._scalars.clear()
            every = self.weights * self.column(self.sizes)
            self._scalars[key] = every if key is None else every * self.column(key)
        return self._scalars[key]

    @cached_property
    def share(self) -> Tensor:
        """``[n]``: one update, summed over ranks."""
        return self.column([1 / self._ranks] * len(self.sizes))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Of each sampled scalar: its parameter, and its place among those of that parameter; int64 ``[total]``."""
        owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes, dtype=torch.int64))
        place = torch.cat([torch.arange(size) for size in self.sizes] or [owner])
        return owner.to(self.device, non_blocking=True), place.to(self.device, non_blocking=True)

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Sampled scalars of ``tensors``, one shaped like each parameter; None is all zero."""
        return self.joined([None if t is None else strided(t, self.limit) for t in tensors])

    def joined(self, parts: Sequence[Tensor | None], missing: float = 0.0) -> Tensor:
        """One vector ``[sum(sizes)]`` of sampled parts, float32 or wider; a copy that does not follow its sources."""
        device = self.device
        filled = [
            torch.full((size,), missing, device=device) if part is None else part
            for part, size in zip(parts, self.sizes)
        ]
        if not filled:
            return torch.zeros(0, device=device)
        try:
            flat = torch.cat(filled)
        except RuntimeError:  # parameters on several devices
            flat = torch.cat([part.to(device, non_blocking=True) for part in filled])
        flat = flat.to(device, non_blocking=True)
        return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()

    def squares(self, flat: Tensor) -> Tensor:
        """Sum of squares over each parameter's sample, ``[n]``."""
        return segment_squares(flat, self.sizes) if self.sizes else torch.zeros(0, device=self.device)

    def counts(self, flags: Tensor) -> Tensor:
        """How many of ``flags`` ``[total]`` are true in each parameter's sample, ``[n]``."""
        return segment_counts(flags, self.sizes) if self.sizes else torch.zeros(0, device=self.device)

    def column(self, values: Sequence[float | Tensor]) -> Tensor:
        """One number a parameter, ``[n]`` in float64 on the device; what comes from the host is sent there once."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        tensors = [v for v in values if isinstance(v, Tensor)]
        if not tensors:
            key = tuple(map(float, values))
            if key not in self._columns:
                if len(self._columns) >= 16:  # a learning rate that changes every step
                    self._columns.clear()
                self._columns[key] = torch.tensor(key, dtype=wide).to(self.device, non_blocking=True)
            return self._columns[key]
        homes = {t.device for t in tensors}
        home = homes.pop() if len(homes) == 1 else self.device
        parts = [torch.as_tensor(v, dtype=wide).to(home, wide, non_blocking=True).reshape(()) for v in values]
        return torch.stack(parts).to(self.device, non_blocking=True)


class SampledGradients(NamedTuple):
    """Gradients of a sample.

    Args:
        flat: ``[total]``; 0 where not sampled.
        graded: Whether each parameter has a gradient.
        sampled: Whether it was looked at; a sparse gradient is not.
    """

    flat: Tensor
    graded: list[bool]
    sampled: list[bool]


def sampled_gradients(sample: ParameterSample) -> SampledGradients:
    """The gradients that the parameters have now."""
    gradients = [p.grad for p in sample.parameters]
    dense = [None if g is None or g.layout is not torch.strided else g for g in gradients]
    return SampledGradients(sample.flat(dense), [g is not None for g in gradients], [g is not None for g in dense])


class Update:
    """One update of one optimizer: the sample before and after it, each looked at once for all who ask.

    To be used under ``no_grad``.

    Args:
        sample: What to look at.
        optimizer: The optimizer that is about to step.
    """

    def __init__(self, sample: ParameterSample, optimizer: Optimizer) -> None:
        self.sample = sample
        self.optimizer = optimizer
        self._before: Tensor | None = None

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps the sample as it is now, before the update."""
        if self._before is None:
            self._before = self.sample.flat(self.sample.parameters)

    @property
    def before(self) -> Tensor:
        """``[total]``: the sample as it was.

        Raises:
            RuntimeError: If nobody asked for it in time.
        """
        if self._before is None:
            raise RuntimeError("remember() was not called before the update")
        return self._before

    @cached_property
    def change(self) -> Tensor:
        """``[total]``: what the update added to each scalar."""
        return self.sample.flat(self.sample.parameters) - self.before

    @cached_property
    def gradients(self) -> SampledGradients:
        """As the optimizer used them. Ask after the update: a closure may have computed them inside it."""
        return sampled_gradients(self.sample)

    @cached_property
    def change_squares(self) -> Tensor:
        """``[n]``: sum of squares of :attr:`change` over each parameter's sample."""
        return self.sample.squares(self.change)

    @cached_property
    def gradient_squares(self) -> Tensor:
        """``[n]``: sum of squares of the gradient over each parameter's sample."""
        return self.sample.squares(self.gradients.flat)


def can_sample(tensor: Tensor) -> bool:
    """Whether the tensor holds its numbers itself."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return False
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return not hasattr(part, "__tensor_flatten__")
