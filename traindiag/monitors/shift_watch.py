"""When training becomes another one: what is marked, and what shows in loss, learning rate, optimizer and data."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from traindiag.capture.watched import Watched
from traindiag.monitors.loss import LossMonitor
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.continual import HORIZON
from traindiag.record.frame import Reading
from traindiag.record.loss_jump import LossJump
from traindiag.transfer.states import Group, Reduced

LOSS, RATE, RESET, DATA = "loss jumped", "learning rate raised", "optimizer reset", "data changed"

RISES = 2.0
RISES_WITHIN = 50
"""A learning rate beyond twice its lowest of so many updates is another regime: re-warming alone raises the loss even
on the same data (arXiv 2403.08763)."""

REST, LOSS_REST = 50, HORIZON
"""Steps after a shift in which nothing that is found is another one, and in which a loss that jumps is none: single
batches of data that is still new stand out, and a gap that is open must not lose its baseline to one. What is marked
always is another one."""

_SHIFT = BY_NAME["stability/shift"]


class ShiftWatch(Monitor):
    """``stability/shift``, at the step at which it happens; joins a run with
    :class:`~traindiag.monitors.stability_gap.StabilityGap`.

    What one rank sees travels in the message of the step, so that all ranks turn at the same one.

    Args:
        turn: Told of every shift with its step, its reasons and the task that training turns to.
        step: Gives the step that is under way.
        detects: Whether shifts are looked for, or only taken where they are marked.
    """

    name = "shift_watch"
    family = "stability"
    lane = "fast"
    impatient: ClassVar[bool] = True
    signals = (_SHIFT,)

    def __init__(
        self, turn: Callable[[int, tuple[str, ...], str | None], None], step: Callable[[], int], detects: bool
    ) -> None:
        self._turn, self._step, self._detects = turn, step, detects
        self._marks: dict[str, str | None] = {}
        self._found: set[str] = set()
        self._loss = LossMonitor()
        self._jumps: dict[str, LossJump] = {}
        self._optimizers: Mapping[str, Optimizer] = {}
        self._rates: dict[str, _Rate] = {}
        self._states: dict[str, _State] = {}
        self._last: int | None = None
        self.marked = False
        """Whether a shift was marked in the step that was sent last, on this rank."""

    @property
    def marks(self) -> bool:
        """Whether a shift is marked for the step under way."""
        return bool(self._marks)

    def mark(self, reason: str, task: str | None) -> None:
        """A shift begins with the step under way, or with the next one between steps."""
        self._marks[reason] = task

    def forget(self) -> None:
        """Another run begins: only what is marked for it goes on."""
        self._found.clear()
        self._jumps.clear()
        self._rates.clear()
        self._states.clear()
        self._last = None

    def prepare(self, watched: Watched) -> None:
        self._optimizers = watched.optimizers

    def loss(self, optimizer: str, value: Tensor) -> None:
        self._loss.loss(optimizer, value)

    def updated(self, optimizer: str) -> None:
        if not self._detects:
            return
        own = self._optimizers[optimizer]
        rate = own.param_groups[0].get("lr")
        if isinstance(rate, (int, float)) and self._rates.setdefault(optimizer, _Rate()).jumps(float(rate)):
            self._found.add(RATE)
        if self._states.setdefault(optimizer, _State()).is_another(own):
            self._found.add(RESET)

    def data_changed(self) -> None:
        if self._detects:
            self._found.add(DATA)

    def collect(self) -> Sequence[Group]:
        marks, self._marks = self._marks, {}
        found, self._found = self._found, set()
        self.marked = bool(marks)
        step = torch.tensor([float(self._step())], dtype=torch.float64)
        groups = [*self._loss.collect(), Group("step", Cells.single(), {"sum": step, "ranks": torch.ones(1)})]
        if reasons := [*marks, *sorted(found)]:
            by = torch.tensor([1.0 if reason in marks else 0.0 for reason in reasons])
            groups.append(Group("found", Cells.along("reason", reasons), {"marked": by}))
        if tasks := sorted({task for task in marks.values() if task is not None}):
            groups.append(Group("tasks", Cells.along("task", tasks), {"marked": torch.ones(len(tasks))}))
        return groups

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (clock := states.get("step")) is None:
            return []
        step = round(float(clock.sums["sum"][0] / clock.sums["ranks"][0]))
        reasons: dict[str, bool] = {}
        if (group := states.get("found")) is not None:
            reasons = {
                str(group.cells.coordinates[i][0]): bool(group.sums["marked"][i] > 0)
                for i in np.flatnonzero(group.seen)
            }
        since = None if self._last is None else step - self._last
        if self._loss_jumped(states) and (reasons or since is None or since >= LOSS_REST):
            reasons[LOSS] = False
        if not any(reasons.values()) and since is not None and since < REST:
            reasons = {}
        if not reasons:
            return []
        self._last = step
        for jump in self._jumps.values():
            jump.forget()
        tasks = states.get("tasks")
        task = None
        if tasks is not None and tasks.seen.any():
            task = str(tasks.cells.coordinates[int(np.flatnonzero(tasks.seen)[0])][0])
        self._turn(step, tuple(reasons), task)
        cells = Cells.along("reason", reasons)
        return [Reading(_SHIFT, cells, np.ones(len(cells), np.float32), np.ones(len(cells), np.bool_))]

    def _loss_jumped(self, states: Mapping[str, Reduced]) -> bool:
        jumped = False
        if not self._detects:
            return jumped
        for reading in self._loss.readings(states):
            for i in np.flatnonzero(reading.seen):
                jump = self._jumps.setdefault(reading.cells.label(int(i)), LossJump())
                jumped = jump.push(float(reading.values[i])) or jumped
        return jumped

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": self._last,
            "jumps": {name: jump.state_dict() for name, jump in self._jumps.items()},
            "rates": {name: rate.state_dict() for name, rate in self._rates.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = state["last"]
        for name, jump in state["jumps"].items():
            self._jumps.setdefault(name, LossJump()).load_state_dict(jump)
        for name, rate in state["rates"].items():
            self._rates.setdefault(name, _Rate()).load_state_dict(rate)


class _Rate:
    """One learning rate. The first climb of a run is its warm-up and no jump."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RISES_WITHIN)
        self._warming = True

    def jumps(self, rate: float) -> bool:
        """Takes the rate of the next update; whether it has jumped."""
        before = self._recent[-1] if self._recent else rate
        if self._warming and rate <= before and len(self._recent) > 1:
            self._warming = False
            self._recent = deque([before], RISES_WITHIN)  # where the climb began is no level
        lowest = min(self._recent, default=rate)
        self._recent.append(rate)
        if self._warming or not rate > RISES * lowest * (1 + 1e-6):
            return False
        self._recent = deque([rate], RISES_WITHIN)
        self._warming = True  # the rest of this climb belongs to it
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent), "warming": self._warming}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent = deque(state["recent"], RISES_WITHIN)
        self._warming = bool(state["warming"])


class _State:
    """One tensor of an optimizer's state. Optimizers write into it; a state that was cleared or loaded is another."""

    def __init__(self) -> None:
        self._known: weakref.ref[Tensor] | None = None
        self._steady = False

    def is_another(self, optimizer: Optimizer) -> bool:
        """Whether it is not the one that it was at the last two updates; one that never stays says nothing."""
        now = _first_tensor(optimizer)
        if now is None:
            return False
        before, self._known = self._known, weakref.ref(now)
        was, self._steady = self._steady, before is not None and before() is now
        return was and not self._steady


def _first_tensor(optimizer: Optimizer) -> Tensor | None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    return value
            if optimizer.state.get(parameter):
                return None
    return None
