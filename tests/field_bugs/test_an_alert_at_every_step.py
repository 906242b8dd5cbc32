"""A rule without memory tells the same thing at every step until nobody reads it any more."""

from __future__ import annotations

from tests.field_bugs.loop import gpt, train
from traindiag.rules.threshold import Threshold


def test_what_lasts_is_one_alert() -> None:
    always = Threshold("loss/value", above=0.0, name="always", severity="warning")
    called = []
    diagnostics = train(
        gpt(layers=1),
        steps=40,
        rules=[always],
        actions=[called.append],
        default_rules=False,
    )
    told = [a for a in diagnostics.alerts if a.rule == "always"]
    assert [a.status for a in told] == ["opened"]
    assert [a.id for a in called] == [a.id for a in told]
