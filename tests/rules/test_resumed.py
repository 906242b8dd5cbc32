"""A resumed job whose optimizer began anew, told by numbers alone."""

from __future__ import annotations

import math

import pytest

from tests.rules.frames import frame, reading
from traindiag.rules.resumed import OptimizerStateLost
from traindiag.rules.rule import Verdict

SIGNAL = "optimizer/sentinel_rms_t"


def say(rule: OptimizerStateLost, step: int, segment: int, values: list[float]) -> list[Verdict]:
    return list(rule.update(frame(step, reading(values, SIGNAL), lane="fast", segment=segment)))


def resumed(values: list[float]) -> list[Verdict]:
    rule = OptimizerStateLost()
    healthy = [1.02, 0.97, 1.1, 0.9][: len(values)]
    assert say(rule, 0, 0, [1.0 for _ in healthy]) == []  # the first step of the run looks the same and is right
    assert say(rule, 1, 0, healthy) == []
    return say(rule, 2, 1, values)


@pytest.mark.parametrize("values", [[1.0, 0.9999, 0.9995], [0.12, 1.0, 1.0, 1.0], [0.6, 1.0]])
def test_a_second_moment_of_one_gradient(values: list[float]) -> None:
    (verdict,) = resumed(values)
    assert (verdict.kind, verdict.severity, verdict.active) == ("wiring", "warning", True)


@pytest.mark.parametrize(
    "values",
    [
        [1.02, 0.97, 1.1, 0.9],
        [1.0, 1.0, 1.0, 1.3],
        [1.0, 0.9, 0.9, 0.9],
        [1.0, math.nan, 1.0, 1.0],
        [0.9995, 0.9995, 0.9],
    ],
)
def test_a_second_moment_that_was_restored(values: list[float]) -> None:
    assert resumed(values) == []


def test_it_holds_for_a_while_and_ends_once_in_any_job() -> None:
    rule = OptimizerStateLost(aftermath=5)
    say(rule, 0, 0, [1.0] * 4)
    assert say(rule, 1, 1, [1.0] * 4)
    again = OptimizerStateLost(aftermath=5)
    again.load_state_dict(rule.state_dict())
    said = [say(again, step, 1, [0.9] * 4) for step in range(2, 9)]
    assert [[v.active for v in verdicts] for verdicts in said] == [[True]] * 4 + [[False], [], []]


def test_a_step_in_the_middle_of_a_job_is_not_judged() -> None:
    rule = OptimizerStateLost()
    say(rule, 0, 0, [0.9] * 4)
    assert say(rule, 1, 0, [1.0] * 4) == []
    say(rule, 2, 1, [0.9] * 4)
    assert say(rule, 3, 1, [1.0] * 4) == []


def test_a_job_resumed_without_any_state_of_ours_is_not_judged() -> None:
    assert say(OptimizerStateLost(), 9, 1, [1.0] * 4) == []
