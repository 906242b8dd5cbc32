"""From verdicts to alerts: one event a rule, told when it opens, gets worse and is over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from traindiag.alerts.alert import Alert, Span, Status
from traindiag.alerts.explain import explain
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cell
from traindiag.record.frame import Frame
from traindiag.record.signal import Clock
from traindiag.rules.rule import SEVERITIES, Severity, Verdict

KEEP = 500
"""Alerts held in memory and in the checkpoint; the oldest go first."""


@dataclass
class _Event:
    """An event that is open, or over for less than its cooldown."""

    id: str
    told: Severity
    last: Verdict
    ended: int | None = None


class AlertBook:
    """Keeps one event for each rule.

    An event opens at the first active verdict, is told again when its severity rises, and closes when its rule has
    been quiet for the cooldown. What comes back within the cooldown is the same event going on, and is not told:
    so a rule tells at most four alerts (opened, escalated twice, closed) for each cooldown, however it flaps.

    Args:
        run_id: Identifier of the run, the same for all of its jobs.
        keep: Alerts kept in :attr:`alerts`.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> book = AlertBook("run")
        >>> high = Verdict("kl", "threshold", "reward/kl", 7, value=30.0, limit=10.0)
        >>> [a.status for a in book.update(Frame(7, "fast", {}, RunInfo()), [high])]
        ['opened']
        >>> book.update(Frame(8, "fast", {}, RunInfo()), [high])
        []
    """

    def __init__(self, run_id: str, *, keep: int = KEEP) -> None:
        self.run_id, self.keep = run_id, keep
        self.alerts: list[Alert] = []
        """Oldest first."""
        self._events: dict[str, _Event] = {}

    def update(self, frame: Frame, verdicts: Iterable[Verdict]) -> list[Alert]:
        """Takes the verdicts of one frame, none included, and returns what is new to tell, oldest first."""
        new: list[Alert] = []
        for verdict in verdicts:
            event = self._events.get(verdict.rule)
            if event is not None and event.ended is not None and frame.step - event.ended >= event.last.cooldown:
                new.append(self._close(frame, verdict.rule, event))
                event = None
            if not verdict.active:
                if event is not None and event.ended is None:
                    event.ended = verdict.step
            elif event is None:
                event = _Event(self._identify(verdict), verdict.severity, verdict)
                self._events[verdict.rule] = event
                new.append(self._alert(frame, event, "opened"))
            else:
                event.last, event.ended = verdict, None
                if SEVERITIES.index(verdict.severity) > SEVERITIES.index(event.told):
                    event.told = verdict.severity
                    new.append(self._alert(frame, event, "escalated"))
        for rule, event in list(self._events.items()):
            if event.ended is not None and frame.step - event.ended >= event.last.cooldown:
                new.append(self._close(frame, rule, event))
        self.alerts = [*self.alerts, *new][-self.keep :] if new else self.alerts
        return new

    def open(self) -> list[Verdict]:
        """The last verdict of every event that is going on."""
        return [event.last for event in self._events.values() if event.ended is None]

    def _identify(self, verdict: Verdict) -> str:
        text = "\0".join((self.run_id, verdict.rule, str(verdict.cell), str(verdict.step)))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _close(self, frame: Frame, rule: str, event: _Event) -> Alert:
        del self._events[rule]
        before = f"; before, {event.last.evidence}" if event.last.evidence else ""
        evidence = f"over since step {event.ended}{before}"
        event.last = replace(event.last, severity=event.told, steps_to_limit=None, evidence=evidence)
        return self._alert(frame, event, "closed")

    def _alert(self, frame: Frame, event: _Event, status: Status) -> Alert:
        verdict = event.last
        told = explain(verdict, frame)
        reading = frame.readings.get(verdict.signal)
        signal = BY_NAME.get(verdict.signal) or (reading.signal if reading else None)
        clock: Clock = signal.clock if signal else "slow"
        pace, left = frame.seconds_per_step, verdict.steps_to_limit
        hours: Span | None = (
            None if pace is None or left is None else (left[0] * pace, left[1] * pace, left[2] * pace)
        )
        return Alert(
            id=event.id,
            status=status,
            rule=verdict.rule,
            run=self.run_id,
            segment=frame.segment,
            step=frame.step,
            time=frame.time,
            rank=verdict.rank if frame.run.world_size > 1 else None,
            severity=verdict.severity,
            clock=clock,
            family=verdict.signal.split("/", 1)[0],
            signal=verdict.signal,
            where=str(verdict.cell),
            value=verdict.value,
            limit=verdict.limit,
            kind=verdict.kind,
            steps_to_limit=left,
            time_to_limit=hours,
            title=told.title if status != "closed" else f"Over: {told.title}",
            evidence=verdict.evidence,
            cause=told.cause,
            ruled_out=told.ruled_out,
            remedies=told.remedies if status != "closed" else (),
        )

    def state_dict(self) -> dict[str, Any]:
        """Alerts and events as plain data."""
        events = {
            rule: {"id": e.id, "told": e.told, "ended": e.ended, "last": _plain(e.last)}
            for rule, e in self._events.items()
        }
        return {"alerts": [alert.to_dict() for alert in self.alerts], "events": events}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        self.alerts = [Alert.from_dict(alert) for alert in state["alerts"]]
        self._events = {
            rule: _Event(e["id"], e["told"], _verdict(e["last"]), e["ended"]) for rule, e in state["events"].items()
        }


def _plain(verdict: Verdict) -> dict[str, Any]:
    left = verdict.steps_to_limit
    cell = [list(verdict.cell.axes), list(verdict.cell.coordinates)]
    return {**asdict(verdict), "cell": cell, "steps_to_limit": None if left is None else list(left)}


def _verdict(data: Mapping[str, Any]) -> Verdict:
    left, (axes, coordinates) = data["steps_to_limit"], data["cell"]
    return Verdict(
        **{
            **data,
            "cell": Cell(tuple(axes), tuple(coordinates)),
            "steps_to_limit": None if left is None else tuple(left),
        }
    )
