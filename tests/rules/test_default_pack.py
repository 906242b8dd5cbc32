"""What the default pack says of a healthy run, a failing one and a fine-tuned one."""

from __future__ import annotations

import numpy as np

from tests.rules.frames import frame, reading
from tests.rules.test_forecast import FAILING, HEALTHY
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule_set import RuleSet


def said(logits: list[float]) -> list[tuple[int, str, str]]:
    rules, noise = RuleSet(default_rules(), strict=True), np.random.default_rng(0)
    found: list[tuple[int, str, str]] = []
    for i, value in enumerate(logits):
        norm = (1 + 3 * np.exp(-i / 5)) * float(np.exp(noise.normal(0, 0.3)))
        made = frame(10 * i, reading([value], "attention/logit_range"), reading([norm], "gradient/norm"))
        found += [(v.step, v.rule, v.severity) for v in rules.update(made) if v.active]
    return found


def test_a_healthy_run_is_left_alone() -> None:
    assert said(HEALTHY) == []


def test_a_failing_run_is_warned_before_its_logits_reach_the_limit() -> None:
    first = {rule: step for step, rule, _ in reversed(said(FAILING))}
    assert first["attention/logit-range-to-damage"] < first["attention/logit-range"] == 60


def test_a_model_with_large_logits_from_before_is_told_once_as_info() -> None:
    assert {(rule, severity) for _, rule, severity in said([2200, 2300, 2100, 2500, 2400, 2250] * 5)} == {
        ("attention/logit-range", "info")
    }


def test_a_key_bias_is_a_matter_of_precision_only() -> None:
    rules = RuleSet(default_rules())
    made = frame(0, reading([5.3], "attention/logit_range"), reading([3e4], "attention/max_logit"))
    assert [(v.rule, v.severity) for v in rules.update(made)] == [("attention/max-logit-precision", "info")]
