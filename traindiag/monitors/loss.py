"""The training loss, every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_LOSS = BY_NAME["loss/value"]


class LossMonitor(Monitor):
    """``loss/value``: the mean over micro-batches and ranks, one cell an optimizer."""

    name = "loss"
    family = "loss"
    lane = "fast"
    signals = (_LOSS,)

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._cells: dict[tuple[str, ...], Cells] = {}
        self._counts: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def loss(self, optimizer: str, value: Tensor) -> None:
        self._values.setdefault(optimizer, []).append(value.float())

    def collect(self) -> Sequence[Group]:
        values, self._values = self._values, {}
        if not values:
            return []
        names = tuple(values)
        cells = self._cells.setdefault(names, Cells.along("optimizer", names))
        total = torch.stack([v[0] if len(v) == 1 else torch.stack(v).sum() for v in values.values()])
        count = self._count(tuple(map(len, values.values())), total.device)
        return [Group("value", cells, {"total": total, "count": count})]

    def _count(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """The same numbers of micro-batches step after step: moved to the device once."""
        if (numbers, device) not in self._counts:
            self._counts = {(numbers, device): torch.tensor(numbers, dtype=torch.float32, device=device)}
        return self._counts[numbers, device]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (group := states.get("value")) is None:
            return []
        total, count = group.sums["total"], group.sums["count"]
        mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return [Reading(_LOSS, group.cells, mean.astype(np.float32), group.seen)]
