"""The two lanes of a step: monitors in, frames out, faults contained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from traindiag.monitors.monitor import Monitor
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane as LaneName
from traindiag.transfer.lane import Delivery, Lane
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
        self._strict, self._report = strict, report
        self._faults: dict[str, str] = {}
        self._facts: dict[int, StepFacts] = {}
        faults = [f"fault:{n}" for n in self.monitors]
        self._lane = Lane(device, ["fast_cost", "slow_cost", *faults], sums_only=name == "fast")

    def each(self, event: Callable[[Monitor], None], what: str) -> None:
        """Tells every working monitor of an event."""
        for monitor in self.working():
            try:
                event(monitor)
            except Exception as error:
                self._contain(monitor, what, error)

    def working(self) -> list[Monitor]:
        if not (self.off or self._faults):
            return self._all
        return [m for m in self._all if self.works(m)]

    def works(self, monitor: Monitor) -> bool:
        return monitor.name not in self.off and monitor.name not in self._faults

    @contextmanager
    def contained(self, monitor: Monitor, what: str) -> Iterator[None]:
        """Keeps a fault of ``monitor`` away from the run."""
        try:
            yield
        except Exception as error:
            self._contain(monitor, what, error)

    def _contain(self, monitor: Monitor, what: str, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}"
        if self._strict:
            raise MonitorFault(f"monitor {monitor.name!r} failed in {what}: {cause}") from error
        self._faults.setdefault(monitor.name, f"failed in {what} on rank {rank()}: {cause}")

    def send(self, step: int, facts: StepFacts, costs: tuple[float, float]) -> None:
        """Starts the reduction of what the monitors hold; ``costs`` are this rank's, of the two lanes."""
        groups: dict[Key, Group] = {}
        for monitor in self.working():
            try:
                groups.update({(monitor.name, g.name): g for g in monitor.collect()})
            except Exception as error:
                self._contain(monitor, "collect", error)
        header = {f"fault:{name}": 1.0 for name in self._faults}
        if self.name == "slow":  # the cadence is decided at samples only
            header |= {"fast_cost": costs[0], "slow_cost": costs[1]}
        self._facts[step] = facts
        self._lane.send(step, groups, header)

    def receive(
        self, run: RunInfo, segment: int, patience: float | None = None
    ) -> tuple[Frame, tuple[float, float]] | None:
        """The frame of the step sent last, with the ranks' mean costs; None where none is under way."""
        delivery = self._lane.receive(patience)
        if delivery is None:
            return None
        self._switch_off(delivery)
        by_monitor: dict[str, dict[str, Reduced]] = {}
        for (monitor, group), reduced in delivery.states.items():
            by_monitor.setdefault(monitor, {})[group] = reduced
        working = [m for m in self.working() if m.name in by_monitor]
        readings = {r.signal.name: r for m in working for r in self._readings(m, by_monitor[m.name])}
        facts = self._facts.pop(delivery.step)
        self._facts.clear()
        frame = Frame(
            step=delivery.step,
            lane=self.name,
            readings=readings,
            run=run,
            time=facts.time,
            seconds_per_step=facts.seconds_per_step,
            updates=facts.updates,
            learning_rates=facts.learning_rates,
            segment=segment,
        )
        ranks = world_size()
        return frame, (delivery.header["fast_cost"] / ranks, delivery.header["slow_cost"] / ranks)

    def _readings(self, monitor: Monitor, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        readings: Sequence[Reading] = ()
        try:
            readings = monitor.readings(states)
            monitor.feedback(readings)
        except Exception as error:
            self._contain(monitor, "readings", error)
        if monitor.name in self._faults:  # computed from reduced numbers: every rank fails alike, at this step
            self._switch_off_one(monitor.name)
        return readings

    def _switch_off(self, delivery: Delivery) -> None:
        for name in self.monitors:
            if delivery.header[f"fault:{name}"] > 0 and name not in self.off:
                self._switch_off_one(name)

    def _switch_off_one(self, name: str) -> None:
        self.off[name] = self._faults.pop(name, "failed on another rank")
        self._report(f"monitor {name!r} is switched off on all ranks: {self.off[name]}; training goes on")
