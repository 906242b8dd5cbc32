"""The lanes of a step: monitors in, frames out, faults contained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from traindiag.monitors.monitor import Monitor
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane as LaneName
from traindiag.transfer.lane import Lane
from traindiag.transfer.ranks import rank, world_size
from traindiag.transfer.states import Group, Key, Reduced


class MonitorFault(RuntimeError):
    """A monitor raised while ``strict`` was set."""


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows of a step when it is sent; it joins the numbers when they arrive."""

    updates: Mapping[str, int] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    time: float = field(default_factory=time.time)
    early: bool = False
    batches: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Received:
    """What one lane has shown of a step.

    Args:
        frame: Its numbers.
        costs: Of the fast and the slow lane, means over ranks.
        found: Monitors with their readings.
        faults: Monitors that failed, with the cause where this rank knows it.
        calm: Whether it may have waited to be received.
    """

    frame: Frame
    costs: tuple[float, float]
    found: Sequence[tuple[Monitor, Sequence[Reading]]]
    faults: Mapping[str, str]
    calm: bool = False


class MonitorLane:
    """The monitors of one lane with their messages.

    A monitor that raises is reported once with its cause. Its cells are sent as unseen, the header of the next
    message carries the fault, and when that message is read every rank switches the monitor off at the same step.
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
        self.name = name
        self.monitors = {m.name: m for m in monitors}
        self._all = list(monitors)
        self.off: dict[str, str] = {}
        self.lean = False
        """Whether costly monitors have a rest."""
        self.early = False
        """Whether this step is no sample and only monitors that ask for the first steps work."""
        self._strict, self._report = strict, report
        self._interested: dict[str, list[Monitor]] = {}
        self._faults: dict[str, str] = {}
        self._facts: dict[int, StepFacts] = {}
        faults = [f"fault:{n}" for n in self.monitors]
        self._lane = Lane(device, ["fast_cost", "slow_cost", *faults], sums_only=name == "fast")

    def each(self, event: str, *args: Any, **keywords: Any) -> None:
        """Tells every working monitor that takes an interest in an event of it.

        Args:
            event: Name of a method of :class:`~traindiag.monitors.monitor.Monitor`.
            args: Its arguments.
            keywords: Its keyword arguments.
        """
        interested = self._interested.get(event)
        if interested is None:
            default = getattr(Monitor, event)
            interested = [m for m in self._all if getattr(type(m), event) is not default]
            self._interested[event] = interested
        for monitor in interested:
            if self.works(monitor):
                try:
                    getattr(monitor, event)(*args, **keywords)
                except Exception as error:
                    self._contain(monitor, event, error)

    def working(self) -> list[Monitor]:
        if not (self.off or self._faults or self.lean or self.early):
            return self._all
        return [m for m in self._all if self.works(m)]

    def to_collect(self) -> list[Monitor]:
        """Monitors that have something to send."""
        return self.working()

    def works(self, monitor: Monitor) -> bool:
        if (self.lean and monitor.costly) or (self.early and not monitor.early):
            return False
        return monitor.name not in self.off and monitor.name not in self._faults

    @contextmanager
    def contained(self, monitor: Monitor, what: str) -> Iterator[None]:
        """Keeps a fault of ``monitor`` away from the run."""
        try:
            yield
        except Exception as error:
            self._contain(monitor, what, error)

    def send(self, step: int, facts: StepFacts, costs: tuple[float, float]) -> None:
        """Starts the reduction of what the monitors hold; ``costs`` are this rank's, of the two lanes."""
        groups: dict[Key, Group] = {}
        for monitor in self.to_collect():
            try:
                for group in monitor.collect():
                    groups[monitor.name, group.name] = group
            except Exception as error:
                self._contain(monitor, "collect", error)
        header = {f"fault:{name}": 1.0 for name in self._faults}
        if self.name == "slow":  # the cadence is decided at samples only
            header |= {"fast_cost": costs[0], "slow_cost": costs[1]}
        self._facts[step] = facts
        self._lane.send(step, groups, header)

    @property
    def pending(self) -> bool:
        """Whether a step waits to be received."""
        return self._lane.pending

    @property
    def shelved(self) -> int:
        """Steps on the shelf."""
        return self._lane.shelved

    def shelve(self) -> bool:
        """Puts the step sent last on a shelf, to be received later; False where it cannot wait."""
        return self._lane.shelve()

    def ready(self) -> bool:
        """Waits for the next step to be received; whether it can be received in any thread."""
        return self._lane.ready()

    def receive(self, run: RunInfo, segment: int, patience: float | None = None) -> Received | None:
        """What the oldest step has shown that was not received; None where there is none.

        Changes nothing that the step now running looks at: what follows from it for the monitors is done by
        :meth:`settle`.
        """
        delivery = self._lane.receive(patience)
        if delivery is None:
            return None
        by_monitor: dict[str, dict[str, Reduced]] = {}
        for (owner, group), reduced in delivery.states.items():
            by_monitor.setdefault(owner, {})[group] = reduced
        faults = {name: "" for name in self.monitors if delivery.header[f"fault:{name}"] > 0}
        found: list[tuple[Monitor, Sequence[Reading]]] = []
        for monitor in self._all:
            if monitor.name not in by_monitor or monitor.name in faults or monitor.name in self.off:
                continue
            try:
                found.append((monitor, monitor.readings(by_monitor[monitor.name])))
            except Exception as error:
                faults[monitor.name] = self._told(monitor, "readings", error)
        facts = self._facts.pop(delivery.step)
        frame = Frame(
            step=delivery.step,
            lane=self.name,
            readings={r.signal.name: r for _, readings in found for r in readings},
            run=run,
            time=facts.time,
            seconds_per_step=facts.seconds_per_step,
            updates=facts.updates,
            learning_rates=facts.learning_rates,
            segment=segment,
            early=facts.early and self.name == "slow",
            batches=facts.batches if self.name == "fast" else (),
        )
        ranks = world_size()
        costs = delivery.header["fast_cost"] / ranks, delivery.header["slow_cost"] / ranks
        return Received(frame, costs, found, faults, delivery.calm)

    def state_dict(self) -> dict[str, Any]:
        return {"screen": self._lane.screen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lane.screen.load_state_dict(state["screen"])

    def close(self) -> None:
        """Lets every monitor remove what it has installed."""
        for monitor in self._all:
            with suppress(Exception):
                monitor.close()

    def settle(self, received: Received) -> None:
        """Switches off monitors that failed, on all ranks at this step, and shows the others what they measured."""
        for failed, cause in received.faults.items():
            self._switch_off(failed, cause)
        for monitor, readings in received.found:
            try:
                monitor.feedback(readings)
            except Exception as error:  # of reduced numbers: every rank fails alike
                self._switch_off(monitor.name, self._told(monitor, "feedback", error))

    def _switch_off(self, name: str, cause: str) -> None:
        if name not in self.off:
            self.off[name] = self._faults.pop(name, cause or "failed on another rank")
            with suppress(Exception):
                self.monitors[name].close()
            self._report(f"monitor {name!r} is switched off on all ranks: {self.off[name]}; training goes on")

    def _contain(self, monitor: Monitor, what: str, error: Exception) -> None:
        self._faults.setdefault(monitor.name, self._told(monitor, what, error))

    def _told(self, monitor: Monitor, what: str, error: Exception) -> str:
        """The fault in words.

        Raises:
            MonitorFault: Instead, under ``strict``.
        """
        cause = f"{type(error).__name__}: {error}"
        if self._strict:
            raise MonitorFault(f"monitor {monitor.name!r} failed in {what}: {cause}") from error
        return f"failed in {what} on rank {rank()}: {cause}"
