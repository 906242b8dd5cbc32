"""The second moment of a few telling tensors, and skipped updates, at every step: it warns a few steps ahead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from traindiag.capture.optimizer_state import second_moments, skipped_itself
from traindiag.capture.parameter_sample import ParameterSample, sampled_gradients
from traindiag.capture.watched import Watched
from traindiag.functional.optimizer import rms_t_squares
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.parameter_cells import joined_cells, joined_states, ratio
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.ranks import world_size
from traindiag.transfer.states import Group, Reduced

_SKIPPED = BY_NAME["optimizer/skipped"]
_RMS_T = BY_NAME["optimizer/sentinel_rms_t"]
Named = tuple[str, nn.Parameter]


class SentinelMonitor(Monitor):
    """``optimizer/sentinel_rms_t`` and ``optimizer/skipped``, every step.

    A second moment that has fallen behind shows 1 to 8 steps before the loss does, too short for a sampling cadence.
    Sentinels are the tensors where it showed first: of each optimizer the embedding, and the first matrix of its
    first and of its last block. At most 4096 scalars of each are looked at.

    An update is skipped where gradients were complete and the optimizer was not called (a loss scaler that met an
    overflow, a loop that refused the step), or a fused optimizer found the overflow itself.
    """

    name = "sentinel"
    family = "optimizer"
    lane = "fast"
    costly = True
    signals = (_RMS_T, _SKIPPED)

    def __init__(self) -> None:
        self._optimizers: Mapping[str, Optimizer] = {}
        self._owned: Mapping[str, tuple[Named, ...]] = {}
        self._samples: dict[str, ParameterSample] = {}
        self._states: dict[str, tuple[Tensor, Tensor]] = {}
        self._announced: dict[str, int] = {}
        self._stepped: dict[str, int] = {}
        self._overflowed: dict[str, Tensor] = {}
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._names: dict[tuple[str, ...], Cells] = {}

    def prepare(self, watched: Watched) -> None:
        ranks = world_size()
        self._optimizers, self._owned = watched.optimizers, watched.parameters
        self._samples = {
            name: ParameterSample(name, sentinels(parameters, watched.modules), ranks=ranks)
            for name, parameters in watched.parameters.items()
        }

    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        if not applied and any(p.grad is not None for _, p in self._owned[optimizer]):
            self._announced[optimizer] = self._announced.get(optimizer, 0) + 1

    @torch.no_grad()
    def updated(self, optimizer: str) -> None:
        self._stepped[optimizer] = self._stepped.get(optimizer, 0) + 1
        overflow = skipped_itself(self._optimizers[optimizer])
        if overflow is not None:
            so_far = self._overflowed.get(optimizer)
            flag = (overflow > 0).double() if overflow.device.type != "mps" else (overflow > 0).float()
            self._overflowed[optimizer] = flag if so_far is None else so_far + flag
        sample = self._samples[optimizer]
        moments = second_moments(self._optimizers[optimizer], sample)
        if moments is None:
            return
        gradients = sampled_gradients(sample)
        relative = rms_t_squares(
            gradients.flat, moments.values, sample.sizes, eps=moments.eps, correction=moments.correction
        )
        squares = relative * sample.weights
        scalars = sample.scalars([a and b for a, b in zip(gradients.sampled, moments.there)])
        if overflow is not None:  # then the moments are older than these gradients
            squares, scalars = (torch.where(overflow.to(s.device) > 0, 0.0, s) for s in (squares, scalars))
        if optimizer in self._states:
            squares, scalars = squares + self._states[optimizer][0], scalars + self._states[optimizer][1]
        self._states[optimizer] = squares, scalars

    def collect(self) -> Sequence[Group]:
        states, self._states = self._states, {}
        groups = []
        if states:
            cells = joined_cells(tuple(self._samples[name].cells for name in states))
            squares, scalars = (joined_states([pair[i] for pair in states.values()]) for i in (0, 1))
            groups.append(Group("sentinels", cells, {"squares": squares, "scalars": scalars}))
        if skipped := self._skipped():
            groups.append(skipped)
        return groups

    def _skipped(self) -> Group | None:
        announced, stepped, overflowed = self._announced, self._stepped, self._overflowed
        self._announced, self._stepped, self._overflowed = {}, {}, {}
        names = tuple(name for name in self._optimizers if name in announced or name in stepped)
        if not names:
            return None
        if names not in self._names:
            self._names[names] = Cells.along("optimizer", names)
        missing = tuple(float(max(0, announced.get(n, 0) - stepped.get(n, 0))) for n in names)
        device = self._samples[names[0]].device
        count = self._constant(missing, device)
        if overflowed:
            extra = [overflowed[n].to(device) if n in overflowed else torch.zeros((), device=device) for n in names]
            count = count + torch.stack([e.to(count.dtype) for e in extra])
        return Group("skipped", self._names[names], {"skipped": count})

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """On the device, sent there once."""
        if values not in self._constants:
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._constants[values] = torch.tensor(values, dtype=wide).to(device, non_blocking=True)
        return self._constants[values]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        found = []
        if (group := states.get("sentinels")) is not None:
            scalars = group.sums["scalars"]
            values = np.sqrt(ratio(group.sums["squares"], scalars)).astype(np.float32)
            if (seen := scalars > 0).any():
                found.append(Reading(_RMS_T, group.cells, values, seen))
        if (group := states.get("skipped")) is not None:
            found.append(Reading.masked(_SKIPPED, group.cells, group.sums["skipped"] / world_size(), group.seen))
        return found


def sentinels(parameters: Sequence[Named], modules: Mapping[str, nn.Module]) -> tuple[Named, ...]:
    """The embedding, and the first matrix of the first and of the last block; the first and the last matrix where
    there are no blocks. Fewer where they coincide.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> net = nn.ModuleDict({"blocks": blocks, "embed": nn.Embedding(4, 2)})
        >>> [name for name, _ in sentinels(list(net.named_parameters()), dict(net.named_modules()))]
        ['embed.weight', 'blocks.0.weight', 'blocks.2.weight']
    """
    matrices = [(name, p) for name, p in parameters if p.requires_grad and sum(size > 1 for size in p.shape) > 1]
    if not matrices:
        return ()
    blocks = _blocks([name for name, _ in matrices])
    embeddings = [pair for pair in matrices if _is_embedding(pair[0], modules)]
    first = embeddings[0] if embeddings else matrices[0]
    ends = [matrices[i] for i in blocks] or [matrices[0], matrices[-1]]
    chosen = {id(p): (name, p) for name, p in (first, *ends)}
    return tuple(chosen.values())


def _is_embedding(name: str, modules: Mapping[str, nn.Module]) -> bool:
    module = modules.get(name.rpartition(".")[0])
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "embed" in name.lower()


_NUMBERED = re.compile(r"^(.*?)(?:^|\.)(\d+)\.")


def _blocks(names: Sequence[str]) -> list[int]:
    """Indices of the first name in the first and in the last block of the longest numbered list."""
    lists: dict[str, dict[int, int]] = {}
    for i, name in enumerate(names):
        if (match := _NUMBERED.match(name)) is not None:
            lists.setdefault(match[1], {}).setdefault(int(match[2]), i)
    longest = max(lists.values(), key=len, default={})
    return [longest[min(longest)], longest[max(longest)]] if len(longest) > 1 else []
