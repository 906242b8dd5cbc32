"""From verdicts to alerts: one event a failure, told when it opens, gets worse and is over."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from traindiag.alerts.alert import Alert, Span, Status
from traindiag.alerts.diagnosis.failure import TOGETHER, Case, Failure, Finding, Witness
from traindiag.alerts.diagnosis.failures import diagnose
from traindiag.alerts.diagnosis.memory import Memory
from traindiag.alerts.diagnosis.promotion import promoted
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cell
from traindiag.record.frame import Frame
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Clock
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import SEVERITIES, Rule, Severity, Verdict

KEEP = 500
"""Alerts held in memory and in the checkpoint; the oldest go first."""

WITNESSES = 3
"""Other rules that an alert quotes."""


def own_rules(rules: Iterable[Rule]) -> frozenset[str]:
    """Names of the rules that are none of the default pack.

    Example:
        >>> from traindiag.rules.threshold import Threshold
        >>> sorted(own_rules([*default_rules(), Threshold("reward/kl", above=10.0)]))
        ['reward/kl above 10']
    """
    return frozenset(rule.name for rule in rules) - {rule.name for rule in default_rules()}


@dataclass
class _Event:
    """An event that is open, or over for less than its cooldown."""

    id: str
    told: Severity
    diagnosis: str = ""
    family: str = ""
    title: str = ""
    witnesses: dict[str, Witness] = field(default_factory=dict)
    """By rule, in the order in which they joined."""
    lead: str = ""
    """The rule whose verdict was told last."""
    bundled: bool = False

    @property
    def last(self) -> Verdict:
        return self.witnesses[self.lead].last

    @property
    def ended(self) -> int | None:
        """Step at which the last of its conditions ended; None while one holds."""
        ends = [w.ended for w in self.witnesses.values()]
        return None if None in ends else max(e for e in ends if e is not None)

    def is_over(self, step: int) -> bool:
        return all(w.ended is not None and step - w.ended >= w.last.cooldown for w in self.witnesses.values())


class AlertBook:
    """Keeps one event for each failure, and one for each rule whose verdict no failure explains.

    An event opens at the first active verdict, is told again when its severity rises, and closes when all of its
    rules have been quiet for their cooldown. A rule that finds what another one has found before joins its event as a
    witness: nothing is told unless it is worse. What comes back within the cooldown is the same event going on, and
    is not told: so an event tells at most four alerts (opened, escalated twice, closed) for each cooldown, however
    its rules flap.

    Args:
        run_id: Identifier of the run, the same for all of its jobs.
        keep: Alerts kept in :attr:`alerts`.
        own: Rules of the user's own. Each keeps an event for itself, under its own name, whatever else is open:
            somebody waits for it.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> book = AlertBook("run")
        >>> high = Verdict("kl", "threshold", "reward/kl", 7, value=30.0, limit=10.0)
        >>> [a.status for a in book.update(Frame(7, "fast", {}, RunInfo()), [high])]
        ['opened']
        >>> book.update(Frame(8, "fast", {}, RunInfo()), [high])
        []
    """

    def __init__(self, run_id: str, *, keep: int = KEEP, own: Collection[str] = ()) -> None:
        self.run_id, self.keep, self.own = run_id, keep, frozenset(own)
        self.alerts: list[Alert] = []
        """Oldest first."""
        self._events: list[_Event] = []
        self._memory = Memory()

    def update(self, frame: Frame, verdicts: Iterable[Verdict]) -> list[Alert]:
        """Takes the verdicts of one frame, none included, and returns what is new to tell, oldest first."""
        said = list(verdicts)
        self._memory.take(frame, said)
        if not said and not self._events:
            return []
        over = [event for event in self._events if event.is_over(frame.step)]
        self._events = [event for event in self._events if event not in over]
        new = [self._closed(frame, event) for event in over]
        self._follow(said)
        active = [v for v in said if v.active]
        if any(self._is_news(v) for v in active):
            new += self._tell(frame, active)
        self.alerts = [*self.alerts, *new][-self.keep :] if new else self.alerts
        return new

    def open(self) -> list[Verdict]:
        """The last verdict of every condition that holds."""
        return [w.last for e in self._events for w in e.witnesses.values() if w.ended is None]

    def _follow(self, said: Iterable[Verdict]) -> None:
        """Brings witnesses up to date, all of them before anything is diagnosed."""
        for verdict in said:
            event = self._event_of(verdict.rule)
            if event is None:
                continue
            witness = event.witnesses[verdict.rule]
            if verdict.active:
                if witness.ended is not None and verdict.step - witness.ended > TOGETHER:
                    witness.since = verdict.step
                witness.last, witness.ended = verdict, None
            elif witness.ended is None:
                witness.ended = verdict.step

    def _is_news(self, verdict: Verdict) -> bool:
        event = self._event_of(verdict.rule)
        return event is None or _rank(verdict.severity) > _rank(event.told)

    def _tell(self, frame: Frame, active: Sequence[Verdict]) -> list[Alert]:
        """Gives each verdict its event, and only then tells of events: once a frame, whatever came together in it."""
        found: dict[str, _Found] = {}
        opened: list[_Event] = []
        for verdict in active:
            if not self._is_news(verdict):
                continue
            failure, finding = found[verdict.rule] = diagnose(self._case(frame, verdict, active))
            event = self._event_of(verdict.rule) or self._kin(verdict, failure, finding)
            if event is None:
                event = _Event(self._identify(verdict), verdict.severity, failure.name if failure else "")
                self._events.append(event)
                opened.append(event)
            event.witnesses.setdefault(verdict.rule, Witness(verdict, verdict.step))
        alerts = []
        for event in self._events:
            leads = [v for v in active if v.rule in event.witnesses and v.rule in found]
            if not leads:
                continue
            lead = max(leads, key=lambda v: _rank(v.severity))  # the first of equals
            severity = promoted(lead.severity, event.witnesses.values(), self._memory)
            is_new = event in opened
            if is_new or _rank(severity) > _rank(event.told):
                event.lead, event.told = lead.rule, severity
                alerts.append(self._told(frame, event, "opened" if is_new else "escalated", *found[lead.rule]))
        return alerts

    def _event_of(self, rule: str) -> _Event | None:
        return next((event for event in self._events if rule in event.witnesses), None)

    def _kin(self, verdict: Verdict, failure: Failure | None, finding: Finding) -> _Event | None:
        """The event that a new verdict is one more witness of."""
        if failure is None or verdict.rule in self.own:
            return None
        others = [e for e in self._events if e.witnesses.keys().isdisjoint(self.own)]
        same = (e for e in others if e.diagnosis == failure.name)
        explained = (e for e in others if not e.witnesses.keys().isdisjoint(finding.witnesses))
        return next(same, None) or next(explained, None)

    def _case(self, frame: Frame, verdict: Verdict, active: Iterable[Verdict]) -> Case:
        witnesses = {
            rule: witness
            for event in self._events
            for rule, witness in event.witnesses.items()
            if witness.ended is None or frame.step - witness.ended <= TOGETHER
        }
        for other in active:
            witnesses.setdefault(other.rule, Witness(other, other.step))
        since = witnesses[verdict.rule].since
        names = tuple(dict.fromkeys(e.diagnosis for e in self._events if e.diagnosis and e.ended is None))
        return Case(verdict, frame, self._memory, tuple(witnesses.values()), since, names)

    def _identify(self, verdict: Verdict) -> str:
        text = "\0".join((self.run_id, verdict.rule, str(verdict.cell), str(verdict.step)))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _told(self, frame: Frame, event: _Event, status: Status, failure: Failure | None, finding: Finding) -> Alert:
        last = event.last
        event.diagnosis, event.family = (failure.name, failure.family) if failure is not None else ("", "")
        event.title = finding.title
        others = [
            f"{w.last.evidence} (step {w.last.step})"
            for rule, w in event.witnesses.items()
            if rule != last.rule and w.last.evidence and (w.ended is None or frame.step - w.ended <= TOGETHER)
        ]
        parts = dict.fromkeys([last.evidence, *finding.evidence, *others[:WITNESSES]])
        bundle: Mapping[str, Any] = {}
        if event.told != "info" and not event.bundled:
            event.bundled = True
            bundle = self._memory.bundle(tensors=_clock(frame, last) == "fast")
        return self._alert(
            frame,
            event,
            status,
            title=finding.title,
            evidence="; ".join(part for part in parts if part),
            cause=finding.cause,
            ruled_out=finding.ruled_out,
            remedies=finding.remedies,
            bundle=bundle,
        )

    def _closed(self, frame: Frame, event: _Event) -> Alert:
        before = f"; before, {event.last.evidence}" if event.last.evidence else ""
        evidence = f"over since step {event.ended}{before}"
        return self._alert(frame, event, "closed", title=f"Over: {event.title}", evidence=evidence)

    def _alert(self, frame: Frame, event: _Event, status: Status, **words: Any) -> Alert:
        last = event.last
        pace, left = frame.seconds_per_step, None if status == "closed" else last.steps_to_limit
        hours: Span | None = (
            None if pace is None or left is None else (left[0] * pace, left[1] * pace, left[2] * pace)
        )
        return Alert(
            id=event.id,
            status=status,
            rule=last.rule,
            run=self.run_id,
            segment=frame.segment,
            step=frame.step,
            time=frame.time,
            rank=last.rank if frame.run.world_size > 1 else None,
            severity=event.told,
            clock=_clock(frame, last),
            family=event.family or last.signal.split("/", 1)[0],
            signal=last.signal,
            where=str(last.cell),
            value=last.value,
            limit=last.limit,
            kind=last.kind,
            steps_to_limit=left,
            time_to_limit=hours,
            diagnosis=event.diagnosis,
            **words,
        )

    def state_dict(self) -> dict[str, Any]:
        """Alerts, events and what is remembered, as plain data."""
        return {
            "alerts": [alert.to_dict() for alert in self.alerts],
            "events": [_plain_event(event) for event in self._events],
            "memory": self._memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; states from before there were diagnoses included."""
        self.alerts = [Alert.from_dict(alert) for alert in state["alerts"]]
        self._memory.load_state_dict(state.get("memory", {}))
        events = state["events"]
        self._events = [
            *(_event(e) for e in events if not isinstance(events, Mapping)),
            *(self._event_of_a_rule(e) for e in (events.values() if isinstance(events, Mapping) else ())),
        ]

    def _event_of_a_rule(self, data: Mapping[str, Any]) -> _Event:
        """An event as it was kept when every rule had its own."""
        last = _verdict(data["last"])
        failure, finding = diagnose(Case(last, Frame(last.step, "slow", {}, RunInfo()), self._memory))
        event = _Event(data["id"], data["told"], failure.name if failure else "", failure.family if failure else "")
        event.title, event.lead, event.bundled = finding.title, last.rule, data["told"] != "info"
        event.witnesses[last.rule] = Witness(last, last.step, data["ended"])
        return event


_Found = tuple[Failure | None, Finding]


def _rank(severity: Severity) -> int:
    return SEVERITIES.index(severity)


def _clock(frame: Frame, verdict: Verdict) -> Clock:
    reading = frame.readings.get(verdict.signal)
    signal = BY_NAME.get(verdict.signal) or (reading.signal if reading else None)
    return signal.clock if signal else "slow"


def _plain_event(event: _Event) -> dict[str, Any]:
    witnesses = [[_plain(w.last), w.since, w.ended] for w in event.witnesses.values()]
    known = {k: getattr(event, k) for k in ("id", "told", "diagnosis", "family", "title", "lead", "bundled")}
    return {**known, "witnesses": witnesses}


def _event(data: Mapping[str, Any]) -> _Event:
    witnesses = [Witness(_verdict(last), since, ended) for last, since, ended in data["witnesses"]]
    return _Event(**{**data, "witnesses": {w.last.rule: w for w in witnesses}})


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
