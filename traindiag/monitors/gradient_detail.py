"""Gradients parameter by parameter, at samples: their size per scalar, how much of them is zero, and clipping."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from traindiag.capture.optimizer_state import skipped_itself
from traindiag.capture.parameter_sample import ParameterSample, Update, sampled_gradients
from traindiag.capture.watched import Watched
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.parameter_cells import joined_cells, joined_states, kept, ratio, reading
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.ranks import world_size
from traindiag.transfer.states import Group, Reduced

CLIP_WINDOW = 30
"""Sampled steps that the clip rate is taken from: 300 steps at a cadence of 10."""

_STATES = ("true", "squares", "looked", "zero")
_SHRUNK = 1e-4
"""A gradient smaller than before by this share was clipped; rounding is a thousand times less."""


class GradientDetailMonitor(Monitor):
    """``gradient/rms``, ``gradient/zero_fraction`` and ``gradient/clip_rate``.

    Of tensors with more than 4096 scalars that many evenly spaced ones are looked at, the same at every sample.
    Sparse gradients are not seen.

    Clipping is measured and not taken from settings: the same scalars are looked at before and after it, and a step
    counts as clipped where any of them shrank by more than 1e-4 of itself. That holds for a clipped norm whoever
    clips it. A clipped *value* is missed where it is none of those looked at. Where a loop does not show gradients
    before clipping, ``rms`` and ``clip_rate`` are not seen.
    """

    name = "gradient_detail"
    family = "gradient"
    lane = "slow"
    signals = (BY_NAME["gradient/rms"], BY_NAME["gradient/zero_fraction"], BY_NAME["gradient/clip_rate"])

    def __init__(self) -> None:
        self._samples: dict[str, ParameterSample] = {}
        self._true: dict[str, Tensor] = {}
        self._updates: dict[str, Update] = {}
        self._states: dict[str, Tensor] = {}
        self._optimizers: Mapping[str, Optimizer] = {}
        self._clips: dict[str, Tensor] = {}
        self._recent: dict[str, deque[float]] = {}
        self._named: dict[tuple[str, ...], Cells] = {}

    def prepare(self, watched: Watched) -> None:
        """Keeps the order of the first call, which is also that of every :class:`Update`."""
        if self._optimizers == watched.optimizers:
            return
        ranks = world_size()
        self._optimizers = watched.optimizers
        self._samples = {
            n: ParameterSample(n, parameters, ranks=ranks) for n, parameters in watched.parameters.items()
        }
        self._true.clear()

    @torch.no_grad()
    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        sample = self._samples[optimizer]
        found = sampled_gradients(sample)
        flat = found.flat if scale is None else found.flat / scale
        looked = sample.scalars(found.sampled)
        zero = torch.minimum(sample.weights * sample.counts(flat == 0), looked)  # what is missing reads 0
        if applied:
            true = squares = torch.zeros_like(looked)
        else:
            true, squares = looked, sample.weights * sample.squares(flat)
            self._true[optimizer] = flat
        states = torch.stack([true, squares, looked, zero])
        self._states[optimizer] = states + self._states[optimizer] if optimizer in self._states else states

    def before_update(self, optimizer: str, update: Update) -> None:
        self._updates[optimizer] = update

    @torch.no_grad()
    def updated(self, optimizer: str) -> None:
        before, update = self._true.pop(optimizer, None), self._updates.pop(optimizer, None)
        if before is None or update is None:
            return
        after = update.gradients.flat
        clipped = (after.abs() < before.abs() * (1 - _SHRUNK)).any().float()
        state = torch.stack([clipped, torch.ones_like(clipped)])
        if (skipped := skipped_itself(update.optimizer)) is not None:
            state = torch.where(skipped.to(state.device) > 0, 0.0, state)
        self._clips[optimizer] = state + self._clips[optimizer] if optimizer in self._clips else state

    def collect(self) -> Sequence[Group]:
        states, clips = self._states, self._clips
        self._states, self._clips = {}, {}
        self._true.clear()
        self._updates.clear()
        groups = []
        if states:
            cells = joined_cells(tuple(self._samples[name].cells for name in states))
            groups.append(Group("parameters", cells, dict(zip(_STATES, joined_states(states.values())))))
        if clips:
            clipped, updates = joined_states([c[:, None] for c in clips.values()])
            names = tuple(clips)
            if names not in self._named:
                self._named[names] = Cells.along("optimizer", names)
            groups.append(Group("clips", self._named[names], maxima={"clipped": clipped, "updates": updates}))
        return groups

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        found = []
        if (group := states.get("parameters")) is not None:
            s, cells = group.sums, group.cells
            rms, zero = np.sqrt(ratio(s["squares"], s["true"])), ratio(s["zero"], s["looked"])
            found.append(reading("gradient/rms", cells, rms, group.seen & (s["true"] > 0)))
            found.append(reading("gradient/zero_fraction", cells, zero, group.seen & (s["looked"] > 0)))
        if (group := states.get("clips")) is not None:
            seen = group.seen & (group.maxima["updates"] > 0)
            rates = np.full(len(seen), np.nan)
            for i in np.flatnonzero(seen):
                recent = self._recent.setdefault(str(group.cells.coordinates[i][0]), deque(maxlen=CLIP_WINDOW))
                recent.append(float(group.maxima["clipped"][i] / group.maxima["updates"][i]))
                rates[i] = np.mean(recent)
            found.append(reading("gradient/clip_rate", group.cells, rates, seen))
        return kept(found)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": {name: list(values) for name, values in self._recent.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent = {name: deque(values, CLIP_WINDOW) for name, values in state["recent"].items()}
