"""The border between diagnostics and the run: an error of our own stays on our side of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import torch

from traindiag.engine.lanes import MonitorLane, Received, StepFacts
from traindiag.monitors.monitor import Monitor
from traindiag.record.frame import Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane as LaneName
from traindiag.transfer.ranks import rank
from traindiag.transfer.states import Group, Reduced

_ENGINE = "engine"


class Border:
    """A context that no unexpected error leaves; it may be entered again while it is open.

    Interrupts and exits pass, and with ``strict`` everything does.

    Args:
        told: Takes every error that was kept.
        strict: Keep nothing.

    Example:
        >>> border = Border(lambda error: print(describe(error).partition(" (")[0]), strict=False)
        >>> with border:
        ...     1 / 0
        ZeroDivisionError: division by zero
    """

    __slots__ = ("_strict", "_told")

    def __init__(self, told: Callable[[Exception], None], *, strict: bool) -> None:
        self._told, self._strict = told, strict

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._strict or not isinstance(error, Exception):
            return False
        self._told(error)
        return True


def describe(error: Exception) -> str:
    """Kind, message and place of an error, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{place}".split())


class LeavingLane(MonitorLane):
    """A lane that an engine which has failed can leave without a rank waiting for it.

    The fault of the engine travels like that of a monitor, in the header of the step under way, whose cells are
    sent as unseen. Every rank reads it one step later, before it sends, so all of them end with the same message.
    """

    def __init__(
        self,
        name: LaneName,
        monitors: Sequence[Monitor],
        device: torch.device,
        *,
        strict: bool,
        report: Callable[[str], None],
    ) -> None:
        super().__init__(name, [*monitors, _Engine()], device, strict=strict, report=report)

        self.left: str | None = None
        """Why every rank ends here; None while it does not."""

    def leave(self, cause: str) -> None:
        """The engine has failed on this rank: the next message says so and holds nothing else."""
        self._faults.setdefault(_ENGINE, f"the engine failed on rank {rank()}: {cause}")

    def send(self, step: int, facts: StepFacts, costs: tuple[float, float]) -> None:
        if _ENGINE not in self._faults:
            try:
                super().send(step, facts, costs)
                return
            except Exception as error:
                self.leave(describe(error))
                self._farewell(step, facts)  # other ranks are waiting for something
                raise
        self._farewell(step, facts)

    def _farewell(self, step: int, facts: StepFacts) -> None:
        self._facts[step] = facts
        self._lane.send(step, {}, {f"fault:{_ENGINE}": 1.0})

    def receive(self, run: RunInfo, segment: int, patience: float | None = None) -> Received | None:
        received = super().receive(run, segment, patience)
        if received is not None and _ENGINE in received.faults:
            self.left = self._faults.get(_ENGINE, "the engine failed on another rank")
            others = {name: cause for name, cause in received.faults.items() if name != _ENGINE}
            received = replace(received, faults=others)  # told by the engine, in its own words
        return received


class _Engine(Monitor):
    """Measures nothing: a place in the header for the engine's own fault."""

    name = _ENGINE
    family = _ENGINE
    signals = ()

    def collect(self) -> Sequence[Group]:
        return ()

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        return ()
