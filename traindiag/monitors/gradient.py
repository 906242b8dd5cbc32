"""Gradient norms of every parameter and every block, every step, and at samples what clipping leaves of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from traindiag.capture.blocks import parameter_blocks
from traindiag.capture.optimizer_state import skipped_itself
from traindiag.capture.watched import Watched
from traindiag.functional.gradient import norms, replicas
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells, Coordinates
from traindiag.record.frame import Reading
from traindiag.record.signal import Signal
from traindiag.transfer.ranks import world_size
from traindiag.transfer.states import Group, Reduced

_NORM = BY_NAME["gradient/norm"]
_APPLIED = BY_NAME["gradient/norm_applied"]
_BLOCK = BY_NAME["gradient/block_norm"]
_PARAMETER = BY_NAME["gradient/parameter_norm"]
_AXES = ("optimizer", "block", "parameter")
"""Of the states: they say where a parameter stands, to ranks that hold other parts of the model as well."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class GradientMonitor(Monitor):
    """``gradient/norm``, ``norm_applied``, ``block_norm`` and ``parameter_norm``.

    The states are squared norms, so that the global norm and that of a block are sums of them and a sharded parameter
    adds up over ranks. Where an optimizer updates several times in a step each is the root mean square over its
    updates. A parameter without a gradient is not seen; it is not a parameter with gradient zero. A parameter that
    several modules share counts once, where it is met first.

    ``norm_applied`` is taken right before the optimizer uses its gradients, whoever has clipped them: at every step
    where they are shown at no other time, and at samples beside ``norm``.
    """

    name = "gradient"
    family = "gradient"
    lane = "fast"
    signals = (_NORM, _APPLIED, _BLOCK, _PARAMETER)

    def __init__(self) -> None:
        self._optimizers: Mapping[str, Optimizer] = {}
        self._plans: dict[str, _Plan] = {}
        self._states: dict[tuple[str, str], _Squares] = {}
        self._to_be_applied: dict[str, _Squares] = {}
        self._named: dict[tuple[str, ...], Cells] = {}
        self._places: dict[str, _Places] = {}
        self._joined: dict[str, tuple[tuple[Cells, ...], Cells]] = {}

    def prepare(self, watched: Watched) -> None:
        blocks = parameter_blocks(watched)
        self._optimizers = watched.optimizers
        self._plans = {name: _Plan.of(name, parameters, blocks) for name, parameters in watched.parameters.items()}

    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        found = self._plans[optimizer].squares(scale)
        if found is not None:
            self._add(optimizer, "applied" if applied else "true", found)

    def applied(self, optimizer: str, *, scale: Tensor | float | None = None) -> None:
        found = self._plans[optimizer].squares(scale)
        if found is not None:
            self._to_be_applied[optimizer] = found

    def updated(self, optimizer: str) -> None:
        found = self._to_be_applied.pop(optimizer, None)
        if found is None:
            return
        if (skipped := skipped_itself(self._optimizers[optimizer])) is not None:
            skips = skipped.to(found.squares.device) > 0
            found.squares, found.updates = (torch.where(skips, 0.0, s) for s in (found.squares, found.updates))
        self._add(optimizer, "applied", found)

    def _add(self, optimizer: str, kind: str, found: _Squares) -> None:
        state = self._states.setdefault((optimizer, kind), found)
        if state is not found:
            state.squares, state.updates = state.squares + found.squares, state.updates + found.updates

    def collect(self) -> Sequence[Group]:
        states, self._states = self._states, {}
        self._to_be_applied.clear()
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
            totals = np.array([s.sum(where=there) for s, there in zip(squares, seen)])
            any_seen = np.array([there.any() for there in seen])
            readings.append(_roots(signal, self._optimizer_cells(tuple(groups)), [totals], [any_seen]))
            if signal is _NORM:
                places = [self._places_of(g.cells) for g in groups.values()]
                cells = self._together("block", tuple(p.blocks for p in places))
                sums, there = zip(*(p.sums(s, t) for p, s, t in zip(places, squares, seen)))
                readings.append(_roots(_BLOCK, cells, sums, there))
                cells = self._together("parameter", tuple(p.parameters for p in places))
                readings.append(_roots(_PARAMETER, cells, squares, seen))
        return readings

    # the same objects while nothing changes, which keeps the log compact

    def _optimizer_cells(self, names: tuple[str, ...]) -> Cells:
        if names not in self._named:
            self._named[names] = Cells.along("optimizer", names)
        return self._named[names]

    def _places_of(self, cells: Cells) -> _Places:
        if cells.digest not in self._places:
            self._places[cells.digest] = _Places.of(cells)
        return self._places[cells.digest]

    def _together(self, axis: str, parts: tuple[Cells, ...]) -> Cells:
        """The cells of all optimizers in one."""
        if len(parts) == 1:
            return parts[0]
        known, joined = self._joined.get(axis, ((), None))
        if joined is None or len(known) != len(parts) or any(a is not b for a, b in zip(known, parts)):
            together: tuple[Coordinates, ...] = sum((p.coordinates for p in parts), ())
            joined = Cells(parts[0].axes, together)
            self._joined[axis] = (parts, joined)
        return joined


def _roots(signal: Signal, cells: Cells, squares: Sequence[Floats], seen: Sequence[Flags]) -> Reading:
    several = len(squares) > 1
    values = np.sqrt(np.concatenate(squares) if several else squares[0])
    with np.errstate(over="ignore"):
        return Reading(signal, cells, values.astype(np.float32), np.concatenate(seen) if several else seen[0])


def _mean_squares(group: Reduced) -> tuple[Floats, Flags]:
    """Over the updates of a step, NaN where there was none; and where there was one."""
    squares, updates = group.sums["squares"], group.sums["updates"]
    seen = updates > 0
    if seen.all():
        return squares / updates, seen
    return np.divide(squares, updates, out=np.full(seen.shape, np.nan), where=seen), seen


@dataclass(frozen=True)
class _Places:
    """What the cells of the states are made of, and the block of each."""

    parameters: Cells
    blocks: Cells
    block_of: NDArray[np.intp]

    @classmethod
    def of(cls, cells: Cells) -> _Places:
        parameters = Cells(_PARAMETER.axes, tuple((o, p) for o, _, p in cells.coordinates))
        blocks = Cells(_BLOCK.axes, tuple(dict.fromkeys((o, b) for o, b, _ in cells.coordinates)))
        at = [blocks.position[o, b] for o, b, _ in cells.coordinates]
        return cls(parameters, blocks, np.array(at, np.intp))

    def sums(self, squares: Floats, seen: Flags) -> tuple[Floats, Flags]:
        """Of each block over what is seen in it; NaN where nothing is."""
        count = len(self.blocks)
        some = np.bincount(self.block_of, seen, count) > 0
        totals = np.bincount(self.block_of, np.where(seen, squares, 0.0), count)
        return np.where(some, totals, np.nan), some


class _Plan:
    """The parameters of an optimizer, and how much of each this rank counts."""

    def __init__(
        self, cells: Cells, parameters: Sequence[nn.Parameter], weights: Tensor | None, share: Tensor
    ) -> None:
        self.cells, self.parameters = cells, tuple(parameters)
        self._weights, self._share = weights, share

    @classmethod
    def of(cls, optimizer: str, parameters: Sequence[tuple[str, nn.Parameter]], blocks: Mapping[str, str]) -> _Plan:
        ranks = world_size()
        cells = Cells(_AXES, tuple((optimizer, blocks[name], name) for name, _ in parameters))
        weights = torch.tensor([1 / replicas(p, ranks) for _, p in parameters], dtype=torch.float64)
        share = torch.full_like(weights, 1 / ranks)
        return cls(cells, [p for _, p in parameters], weights if ranks > 1 else None, share)

    @torch.no_grad()
    def squares(self, scale: Tensor | float | None = None) -> _Squares | None:
        """Squared norms of the gradients that there are now; None where there is none at all."""
        gradients = [g for p in self.parameters if (g := p.grad) is not None]
        if not gradients:
            return None
        found = norms(gradients)
        if scale is not None:
            found = found / scale
        weights, share = self.on(found)
        squares = found.to(share.dtype).square_()  # in float64, where the squares of large norms do not overflow
        if len(gradients) < len(self.parameters):
            present = [i for i, p in enumerate(self.parameters) if p.grad is not None]
            index = torch.tensor(present, device=found.device)
            squares = torch.zeros_like(share).index_copy(0, index, squares)
            share = torch.zeros_like(share).index_copy(0, index, share[index])
        if weights is not None:
            squares *= weights
        return _Squares(self.cells, squares, share)

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
