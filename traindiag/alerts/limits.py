"""The numbers at which the default rules speak, for whoever draws them into a chart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from traindiag.rules.default_pack import described_rules
from traindiag.rules.rule import Severity
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.threshold import Threshold


@dataclass(frozen=True, slots=True)
class Limit:
    """One line in a chart.

    Args:
        value: Where it lies.
        side: The side of it that is bad.
        severity: What passing it is called.
        rule: Name of the rule that judges it.
        says: What that rule watches for.
    """

    value: float
    side: Literal["above", "below"]
    severity: Severity
    rule: str
    says: str


@cache
def default_limits() -> dict[str, tuple[Limit, ...]]:
    """Absolute limits of the default pack by signal, the mildest first; limits relative to a run's past have no line.

    Example:
        >>> [(limit.value, limit.severity) for limit in default_limits()["attention/logit_range"]]
        [(1000.0, 'warning'), (10000.0, 'critical')]
    """
    found: dict[str, dict[float, Limit]] = {}

    def add(signal: str, value: float | None, side: Literal["above", "below"], severity: Severity, says: str) -> None:
        if value is not None:
            found.setdefault(signal, {}).setdefault(value, Limit(value, side, severity, rule.name, says))

    for described in described_rules():
        rule = described.rule
        if isinstance(rule, Threshold):
            add(rule.signal, rule.above, "above", rule.severity, described.says)
            add(rule.signal, rule.below, "below", rule.severity, described.says)
            add(rule.signal, rule.critical_above, "above", "critical", described.says)
            add(rule.signal, rule.critical_below, "below", "critical", described.says)
        elif isinstance(rule, StaleSecondMoment):
            for signal in rule.signals:
                add(signal, rule.above, "above", rule.severity, described.says)
    return {signal: tuple(limits.values()) for signal, limits in found.items()}
