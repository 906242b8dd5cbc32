"""Gradient norms of every parameter, every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from traindiag.capture.watched import Watched
from traindiag.functional.gradient import norms, replicas
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells, Coordinates
from traindiag.record.frame import Reading
from traindiag.transfer.ranks import world_size
from traindiag.transfer.states import Group, Reduced

_NORM = BY_NAME["gradient/norm"]
_APPLIED = BY_NAME["gradient/norm_applied"]
_PARAMETER = BY_NAME["gradient/parameter_norm"]


class GradientMonitor(Monitor):
    """``gradient/norm``, ``gradient/parameter_norm`` and, where clipping cannot be seen, ``gradient/norm_applied``.

    The states are squared norms, so that the global norm is their sum and a sharded parameter adds up over ranks.
    Where an optimizer updates several times in a step the norm is the root mean square over its updates. A parameter
    without a gradient is not seen; it is not a parameter with gradient zero.
    """

    name = "gradient"
    family = "gradient"
    lane = "fast"
    signals = (_NORM, _APPLIED, _PARAMETER)

    def __init__(self) -> None:
        self._plans: dict[str, _Plan] = {}
        self._states: dict[tuple[str, str], _Squares] = {}
        self._named: dict[tuple[str, ...], Cells] = {}
        self._joined: tuple[tuple[Cells, ...], Cells] | None = None

    def prepare(self, watched: Watched) -> None:
        self._plans = {name: _Plan.of(name, parameters) for name, parameters in watched.parameters.items()}

    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        plan = self._plans[optimizer]
        gradients = [g for p in plan.parameters if (g := p.grad) is not None]
        if not gradients:
            return
        found = norms(gradients)
        if scale is not None:
            found = found / scale
        weights, share = plan.on(found)
        squares = found.to(share.dtype).square_()  # in float64, where the squares of large norms do not overflow
        if len(gradients) < len(plan.parameters):
            present = [i for i, p in enumerate(plan.parameters) if p.grad is not None]
            index = torch.tensor(present, device=found.device)
            squares = torch.zeros_like(share).index_copy(0, index, squares)
            share = torch.zeros_like(share).index_copy(0, index, share[index])
        if weights is not None:
            squares *= weights
        key = (optimizer, "applied" if applied else "true")
        state = self._states.get(key)
        if state is None:
            self._states[key] = _Squares(plan.cells, squares, share)
        else:
            state.squares, state.updates = state.squares + squares, state.updates + share

    def collect(self) -> Sequence[Group]:
        states, self._states = self._states, {}
        return [
            Group(f"{kind}:{optimizer}", s.cells, {"squares": s.squares, "updates": s.updates})
            for (optimizer, kind), s in states.items()
        ]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        readings: list[Reading] = []
        for kind, signal in (("true", _NORM), ("applied", _APPLIED)):
            groups = {key.split(":", 1)[1]: g for key, g in states.items() if key.startswith(f"{kind}:")}
            if not groups:
                continue
            squares, seen = zip(*(_mean_squares(g) for g in groups.values()))
            totals = np.sqrt([s.sum(where=there) for s, there in zip(squares, seen)], dtype=np.float32)
            any_seen = np.array([there.any() for there in seen])
            readings.append(Reading(signal, self._optimizer_cells(tuple(groups)), totals, any_seen))
            if signal is _NORM:
                cells = self._parameter_cells(tuple(g.cells for g in groups.values()))
                several = len(squares) > 1
                values = np.sqrt(np.concatenate(squares) if several else squares[0]).astype(np.float32)
                readings.append(Reading(_PARAMETER, cells, values, np.concatenate(seen) if several else seen[0]))
        return readings

    def _optimizer_cells(self, names: tuple[str, ...]) -> Cells:
        if names not in self._named:
            self._named[names] = Cells.along("optimizer", names)
        return self._named[names]

    def _parameter_cells(self, parts: tuple[Cells, ...]) -> Cells:
        """The cells of all optimizers in one; the same object while nothing changes, which keeps the log compact."""
        if len(parts) == 1:
            return parts[0]
        known = self._joined[0] if self._joined else ()
        if self._joined is None or len(known) != len(parts) or any(a is not b for a, b in zip(known, parts)):
            together: tuple[Coordinates, ...] = sum((p.coordinates for p in parts), ())
            self._joined = (parts, Cells(_PARAMETER.axes, together))
        return self._joined[1]


def _mean_squares(group: Reduced) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Over the updates of a step, NaN where there was none; and where there was one."""
    squares, updates = group.sums["squares"], group.sums["updates"]
    seen = updates > 0
    if seen.all():
        return squares / updates, seen
    return np.divide(squares, updates, out=np.full(seen.shape, np.nan), where=seen), seen


class _Plan:
    """The parameters of an optimizer, and how much of each this rank counts."""

    def __init__(
        self, cells: Cells, parameters: Sequence[nn.Parameter], weights: Tensor | None, share: Tensor
    ) -> None:
        self.cells, self.parameters = cells, tuple(parameters)
        self._weights, self._share = weights, share

    @classmethod
    def of(cls, optimizer: str, parameters: Sequence[tuple[str, nn.Parameter]]) -> _Plan:
        ranks = world_size()
        cells = Cells(_PARAMETER.axes, tuple((optimizer, name) for name, _ in parameters))
        weights = torch.tensor([1 / replicas(p, ranks) for _, p in parameters], dtype=torch.float64)
        share = torch.full_like(weights, 1 / ranks)
        return cls(cells, [p for _, p in parameters], weights if ranks > 1 else None, share)

    def on(self, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """Weights, None for ones, and share on the device of the gradients, moved once."""
        if self._share.device != like.device:
            wide = torch.float32 if like.device.type == "mps" else torch.float64
            self._share = self._share.to(like.device, wide)
            if self._weights is not None:
                self._weights = self._weights.to(like.device, wide)
        return self._weights, self._share


@dataclass
class _Squares:
    cells: Cells
    squares: Tensor
    updates: Tensor
