"""Alerts of a log by the event that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from traindiag.alerts.alert import Alert

SEVERITIES = ("info", "warning", "critical")


@dataclass(frozen=True, slots=True)
class Told:
    """One forecast as it was told."""

    step: int
    value: float
    limit: float | None
    steps: tuple[float, float, float]


@dataclass(frozen=True)
class Event:
    """One event, from its first message to its last.

    Args:
        id: Of all its messages.
        messages: Oldest first.
    """

    id: str
    messages: tuple[Alert, ...]

    @property
    def opened(self) -> Alert:
        """What was told first."""
        return self.messages[0]

    @property
    def worst(self) -> Alert:
        """The message of the highest severity, of several the first."""
        return max(self.messages, key=lambda a: (a.status != "closed", SEVERITIES.index(a.severity)))

    @property
    def severity(self) -> str:
        return self.worst.severity

    @property
    def title(self) -> str:
        return self.worst.title or self.worst.rule

    @property
    def closed(self) -> int | None:
        """The step at which it was over, None while it is open."""
        last = self.messages[-1]
        return last.step if last.status == "closed" else None

    @property
    def levels(self) -> list[tuple[int, str]]:
        """Step and severity of its opening, and of each message that made it worse."""
        found: list[tuple[int, str]] = []
        for message in self.messages:
            worse = not found or SEVERITIES.index(message.severity) > SEVERITIES.index(found[-1][1])
            if message.status != "closed" and worse:
                found.append((message.step, message.severity))
        return found

    @property
    def forecasts(self) -> list[Told]:
        """Every message with steps left to a limit."""
        return [
            Told(a.step, a.value, a.limit, a.steps_to_limit)
            for a in self.messages
            if a.steps_to_limit is not None and a.status != "closed"
        ]

    def advice(self) -> Alert:
        """The latest message that says what to do; later ones may only refer to it."""
        return next((a for a in reversed(self.messages) if a.remedies), self.worst)


def events_of(alerts: Iterable[Mapping[str, Any]]) -> tuple[list[Event], list[str]]:
    """Events in the order in which they were opened, and in words what could not be read."""
    messages: dict[str, list[Alert]] = {}
    problems: list[str] = []
    for data in alerts:
        try:
            alert = Alert.from_dict(data)
            if alert.severity not in SEVERITIES:
                raise ValueError(f"there is no severity {alert.severity!r}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"an alert could not be read: {error}")
            continue
        messages.setdefault(alert.id, []).append(alert)
    return [Event(key, tuple(told)) for key, told in messages.items()], problems


def about(events: Sequence[Event], *signals: str) -> list[Event]:
    """Events in which one of the signals was judged."""
    return [e for e in events if any(a.signal in signals for a in e.messages)]
