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
        self._numbers: tuple[tuple[str, int], ...] = ()
        self._cells = Cells.single()
        self._count = torch.zeros(0)

    def loss(self, optimizer: str, value: Tensor) -> None:
        self._values.setdefault(optimizer, []).append(value)

    def collect(self) -> Sequence[Group]:
        values, self._values = self._values, {}
        if not values:
            return []
        numbers = tuple((name, len(v)) for name, v in values.items())
        device = next(iter(values.values()))[0].device
        if numbers != self._numbers or self._count.device != device:  # the same step after step: made once
            self._numbers, self._cells = numbers, Cells.along("optimizer", values)
            self._count = torch.tensor([n for _, n in numbers], dtype=torch.float32, device=device)
        totals = [_sum(v) for v in values.values()]
        total = totals[0] if len(totals) == 1 else torch.cat(totals)
        return [Group("value", self._cells, {"total": total, "count": self._count})]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (group := states.get("value")) is None:
            return []
        total, count = group.sums["total"], group.sums["count"]
        with np.errstate(invalid="ignore"):  # no loss of this cell: 0 / 0, the NaN of what is not seen
            mean = (total / count).astype(np.float32)
        return [Reading(_LOSS, group.cells, mean, group.seen)]


def _sum(values: Sequence[Tensor]) -> Tensor:
    """``[1]``; half precision is added up in float32."""
    if len(values) == 1:
        return values[0].reshape(1)
    return torch.stack([v.reshape(()) for v in values]).float().sum().reshape(1)
