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

    def loss(self, optimizer: str, value: Tensor) -> None:
        self._values.setdefault(optimizer, []).append(value)

    def collect(self) -> Sequence[Group]:
        values, self._values = self._values, {}
        if not values:
            return []
        names = tuple(values)
        cells = self._cells.setdefault(names, Cells.along("optimizer", names))
        total = torch.stack([torch.stack(v).float().sum() for v in values.values()])
        count = torch.tensor([float(len(v)) for v in values.values()]).to(total.device, non_blocking=True)
        return [Group("value", cells, {"total": total, "count": count})]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (group := states.get("value")) is None:
            return []
        total, count = group.sums["total"], group.sums["count"]
        mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return [Reading(_LOSS, group.cells, mean.astype(np.float32), group.seen)]
