"""The lane of monitors that run forward passes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import nn

from traindiag.capture.sandbox import sandbox
from traindiag.engine.containment import LeavingLane
from traindiag.monitors.active import ActiveMonitor
from traindiag.monitors.monitor import Monitor
from traindiag.record.frame import Frame

Precision = Callable[[], AbstractContextManager[object]]
"""The context in which a trainer runs its forward passes, such as autocast."""


class ActiveLane(LeavingLane):
    """A lane whose monitors say themselves in which steps they measure."""

    def __init__(
        self,
        monitors: Sequence[Monitor],
        models: Sequence[nn.Module],
        device: torch.device,
        *,
        strict: bool,
        report: Callable[[str], None],
    ) -> None:
        super().__init__("active", monitors, device, strict=strict, report=report)
        self.precision: Precision = nullcontext
        self.probing = False
        """Whether what the models are called for now is no training."""
        self._models = models
        self._active = [m for m in monitors if isinstance(m, ActiveMonitor)]
        self._due: set[str] = set()

    def ask(self, step: int, updates: Mapping[str, int]) -> bool:
        """Whether any monitor is to be heard after this step. A rank where one has failed answers as others do, or
        they would send their messages without it.
        """
        self._due = {m.name for m in self._active if m.name not in self.off and self._is_due(m, step, updates)}
        return bool(self._due)

    def probe(self, step: int) -> None:
        """Runs the forward passes of those that are due."""
        with self._as_if_alone():
            for monitor in self._active:
                if monitor.name in self._due and self.works(monitor):
                    with self.contained(monitor, "probe"):
                        monitor.probe(step)

    def start(self) -> None:
        """Lets all of them look at the models before the first step."""
        interested = [m for m in self._active if type(m).start is not ActiveMonitor.start and self.works(m)]
        if interested:
            with self._as_if_alone():
                for monitor in interested:
                    with self.contained(monitor, "start"):
                        monitor.start()

    def heed(self, frame: Frame) -> None:
        """Shows a frame to all, those that have failed here included: when they are due must not differ."""
        for monitor in self._active:
            if monitor.name not in self.off:
                with self.contained(monitor, "heed"):
                    monitor.heed(frame)

    def to_collect(self) -> list[Monitor]:
        return [m for m in self.working() if m.name in self._due]

    def _is_due(self, monitor: ActiveMonitor, step: int, updates: Mapping[str, int]) -> bool:
        due = False
        with self.contained(monitor, "due"):
            due = monitor.due(step, updates)
        return due

    @contextmanager
    def _as_if_alone(self) -> Iterator[None]:
        stance = cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))
        self.probing = True
        try:
            with sandbox(self._models), self.precision(), stance:
                yield
        finally:
            self.probing = False
