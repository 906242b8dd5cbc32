"""What is published of the continual demo is what its benchmark measured, and that judged today's rule."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from benchmarks.demo_continual import (
    DIGIT_SEEDS,
    DOCS,
    REPLAYS,
    RESULT,
    SEEDS,
    false_detections,
    judged_by,
    with_tables,
)

FOUND: dict[str, Any] = json.loads(RESULT.read_text())
AGAIN = "run python -m benchmarks.demo_continual"


def of(replay: float) -> list[dict[str, Any]]:
    return [r for r in FOUND["runs"] if r["replay"] == replay]


def test_it_judged_todays_rule_over_all_seeds() -> None:
    assert FOUND["judged_by"] == judged_by(), AGAIN
    assert {(r["replay"], r["seed"]) for r in FOUND["runs"]} == set(product(REPLAYS, SEEDS)), AGAIN
    assert {r["seed"] for r in FOUND["digits"]} == set(DIGIT_SEEDS), AGAIN


def test_with_half_of_it_kept_english_comes_back() -> None:
    for run in of(0.5):
        assert run["verdict"] == "transient" and run["recovery"] is not None and run["closed"]


def test_without_any_it_is_forgotten() -> None:
    for run in of(0.0):
        assert run["verdict"] == "forgetting" and run["severity"] == "critical" and not run["closed"]


@pytest.mark.parametrize(("replay", "call"), [(0.5, "transient"), (0.0, "forgetting")])
def test_the_warning_comes_within_five_evaluations_of_the_switch_and_says_which_it_is(
    replay: float, call: str
) -> None:
    for run in of(replay):
        assert run["warned_after_evaluations"] <= 5 and run["called"] == call


def test_without_a_shift_there_is_no_alert() -> None:
    assert not any(r["alerts_before_switch"] for r in FOUND["runs"]) and not any(r["alerts"] for r in FOUND["digits"])
    false, steps = false_detections(FOUND)
    assert steps >= 10_000 and false <= steps / 10_000


def test_tables_of_the_page_are_those_of_the_result() -> None:
    page = DOCS.read_text()
    assert page == with_tables(page, FOUND), AGAIN
