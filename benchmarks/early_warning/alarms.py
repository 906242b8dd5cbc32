"""Our alarms: events that reached WARNING, and when a person would have known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from traindiag.alerts.alert import Alert
from traindiag.engine.judge import BATCH
from traindiag.record.catalogue import BY_NAME, ON_DEMAND
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule_set import RuleSet

COUNTS = ("warning", "critical")


@dataclass(frozen=True)
class Alarm:
    """One event that reached WARNING.

    Args:
        step: First step whose numbers showed it.
        told: Step at whose end a person was told.
        closed: Step at which it was over, None while open.
        severity: The highest that it reached.
        rule: Name of the rule that opened it.
        family: Family that it names.
        diagnosis: Failure that it names, empty for none.
        change: Settings that its first remedy changes.
    """

    step: int
    told: int
    closed: int | None
    severity: str
    rule: str
    family: str
    diagnosis: str
    change: tuple[str, ...] = ()

    def open_at(self, onset: int) -> bool:
        """Whether it was told by ``onset`` and was not over before."""
        return self.told <= onset and (self.closed is None or self.closed >= onset)


def events(alerts: Sequence[Alert]) -> list[Alarm]:
    """The events among alerts that reached WARNING, from the first message that said so."""
    found: dict[str, Alarm] = {}
    for alert in alerts:
        known = found.get(alert.id)
        if alert.status == "closed":
            if known is not None:
                found[alert.id] = _with(known, closed=alert.step)
        elif alert.severity in COUNTS:
            if known is None:
                found[alert.id] = Alarm(
                    alert.step,
                    alert.step + 1 + _lateness(alert),
                    None,
                    alert.severity,
                    alert.rule,
                    alert.family,
                    getattr(alert, "diagnosis", ""),
                    tuple(alert.remedies[0].change) if alert.remedies else (),
                )
            else:
                found[alert.id] = _with(known, severity=alert.severity)
    return list(found.values())


def _lateness(alert: Alert) -> int:
    """Steps that a live run may take longer than one to judge: calm steps wait for others, jumps and NaN do not."""
    signal = BY_NAME.get(alert.signal)
    fast = signal is not None and signal.lane == "fast"
    jumps = alert.kind in ("spike", "nonfinite") or alert.signal == "optimizer/sentinel_rms_t"
    return BATCH - 1 if fast and not jumps else 0


def _with(alarm: Alarm, **changes: Any) -> Alarm:
    return Alarm(**{**alarm.__dict__, **changes})


def pack_digest() -> str:
    """What the numbers were made with: default rules that can judge a run without active monitors."""
    judging = [rule for rule in default_rules() if rule.name.partition("/")[0] not in ON_DEMAND]
    return RuleSet(judging).digest()
