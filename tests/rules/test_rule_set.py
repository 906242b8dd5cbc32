"""Rules together: order, faults, names, states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.rules.frames import frame, reading
from traindiag.record.frame import Frame
from traindiag.rules.default_pack import default_rules
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.rule import Rule, Verdict
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold


class Faulty(Rule):
    name, signals = "faulty", ("user/x",)

    def update(self, frame: Frame) -> Sequence[Verdict]:
        raise RuntimeError(f"step {frame.step}")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise KeyError("gone")


def test_non_finite_is_judged_first() -> None:
    rules = RuleSet([Threshold("loss/value", above=1.0), NonFinite()])
    assert [v.kind for v in rules.update(frame(0, reading([math.inf], "loss/value")))] == ["nonfinite", "threshold"]


def test_two_rules_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'user/x above 1'"):
        RuleSet([Threshold("user/x", above=1.0), Threshold("user/x", above=1.0, persistence=2)])


def test_a_rule_that_raises_is_reported_once_and_switched_off() -> None:
    told: list[str] = []
    rules = RuleSet([Faulty(), Threshold("user/x", above=1.0)], on_fault=lambda name, e: told.append(f"{name} {e}"))
    for step in range(3):
        assert [v.rule for v in rules.update(frame(step, reading([5.0])))] == ["user/x above 1"]
    assert told == ["faulty step 0"]
    assert rules.faults == {"faulty": "RuntimeError: step 0"}
    with pytest.raises(RuntimeError, match="step 0"):
        RuleSet([Faulty()], strict=True).update(frame(0, reading([5.0])))


def test_rules_without_their_signal_are_listed() -> None:
    rules = RuleSet([NonFinite(), Threshold("reward/kl", above=1.0), Spike("gradient/norm", otherwise="user/x")])
    rules.update(frame(0, reading([1.0])))
    assert rules.unjudged() == {"reward/kl above 1": ("reward/kl",)}


def test_states_survive_added_removed_and_broken_rules() -> None:
    old = RuleSet([Threshold("user/x", above=1.0, persistence=2), Threshold("user/x", below=0.0)])
    old.update(frame(0, reading([5.0])))
    told: list[str] = []
    new = RuleSet([Threshold("user/x", above=1.0, persistence=2), NonFinite(), Faulty()],
                  on_fault=lambda name, e: told.append(name))  # fmt: skip
    new.load_state_dict({**old.state_dict(), "faulty": {}})
    assert told == ["faulty"]
    assert [v.rule for v in new.update(frame(1, reading([5.0])))] == ["user/x above 1"]


def test_the_digest_follows_every_setting_and_no_order() -> None:
    digest = RuleSet(default_rules()).digest()
    assert digest == RuleSet(reversed(default_rules())).digest()
    changed = {
        RuleSet([Threshold("user/x", above=a, persistence=p, name="x")]).digest() for a in (1, 2) for p in (1, 2)
    }
    assert len(changed) == 4
    assert digest not in changed
