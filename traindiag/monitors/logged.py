"""Numbers that the user logs, so that every rule works on them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.record.signal import Signal
from traindiag.transfer.states import Group, Reduced


class LoggedMonitor(Monitor):
    """Signals named by the user; the mean over the values of a step and over ranks that have one."""

    name = "logged"
    family = "logged"
    lane = "fast"
    signals = ()

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}
        self._cells: dict[tuple[str, ...], Cells] = {}
        self._signals: dict[str, Signal] = {}

    def log(self, name: str, value: Tensor | float) -> None:
        """Takes one number of this step.

        Raises:
            ValueError: If the name has no family, is a built-in signal's, or the value is not one number.
        """
        if name in BY_NAME:
            raise ValueError(f"{name!r} is a built-in signal; choose another name for a number of your own")
        if "/" not in name or not all(name.split("/", 1)):
            raise ValueError(f"a number of your own is named 'family/metric', got {name!r}")
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}")
            value = value.detach().reshape(())
        self._values.setdefault(name, []).append(value if isinstance(value, Tensor) else float(value))

    def collect(self) -> Sequence[Group]:
        values, self._values = self._values, {}
        if not values:
            return []
        names = tuple(values)
        cells = self._cells.setdefault(names, Cells.along("name", names))
        count = torch.tensor([float(len(v)) for v in values.values()])
        tensors = [v for vs in values.values() for v in vs if isinstance(v, Tensor)]
        if not tensors:
            total = torch.tensor([sum(float(v) for v in vs) for vs in values.values()], dtype=torch.float64)
        else:
            device = tensors[0].device
            sums = [sum(torch.as_tensor(v, dtype=torch.float64).to(device) for v in vs) for vs in values.values()]
            total, count = torch.stack([torch.as_tensor(s) for s in sums]), count.to(device)
        return [Group("value", cells, {"total": total, "count": count})]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (group := states.get("value")) is None:
            return []
        readings = []
        for i in np.flatnonzero(group.seen):
            name = str(group.cells.coordinates[i][0])
            signal = self._signals.setdefault(name, Signal(name, (), "logged by the user", lane="fast"))
            readings.append(Reading.scalar(signal, group.sums["total"][i] / group.sums["count"][i]))
        return readings
