"""The default pack over numbers made by hand."""

from __future__ import annotations

from collections.abc import Iterable

from traindiag.alerts.alert import Alert
from traindiag.playback.judged import judge
from traindiag.record.frame import Frame
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import Rule


def rule(name: str) -> Rule:
    """A new one of the pack's rules."""
    (found,) = (r for r in default_rules() if r.name == name)
    return found


def warnings(alerts: Iterable[Alert]) -> list[tuple[int, str, str]]:
    """Step, rule and place of what is more than a note."""
    return [(a.step, a.rule, a.where) for a in alerts if a.severity != "info"]


def told(frames: Iterable[Frame]) -> list[Alert]:
    """What the pack tells of these frames; no rule may be switched off by them."""
    judged = judge(frames, None, "r")
    assert judged.notes == []
    return judged.alerts
