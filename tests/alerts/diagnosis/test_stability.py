"""A gap that passes and forgetting are two failures, each with its own advice."""

from __future__ import annotations

import numpy as np
import pytest

from tests.rules.test_stability import SHIFT, looks, passing, reading, turn
from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.record.run_info import RunInfo
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.stability import TaskGap


def told(frames: list[Frame]) -> list[Alert]:
    book, rules = AlertBook("run"), RuleSet([TaskGap()])
    return [alert for frame in frames for alert in book.update(frame, rules.update(frame))]


def test_a_gap_that_passes_opens_and_closes() -> None:
    frames = [turn(SHIFT, "learning rate raised"), *looks(passing(0.09))]
    opened, closed = told([*frames, Frame(SHIFT + 60, "fast", {}, RunInfo())])
    assert (opened.status, opened.diagnosis, opened.family, opened.severity) == (
        "opened", "stability gap", "stability", "warning"
    )  # fmt: skip
    assert closed.status == "closed" and closed.id == opened.id
    texts = " ".join(r.text for r in opened.remedies)
    assert "Do not stop" in texts and "Raise the learning rate less" in texts and "replay" not in texts
    assert "Raise the learning rate less" not in " ".join(
        r.text for r in told([turn(SHIFT, "python"), *looks(passing(0.09))])[0].remedies
    )


@pytest.mark.parametrize(("depth", "replay"), [(0.25, 0.05), (0.6, 0.25)])
def test_forgetting_asks_for_old_data_by_the_size_of_the_shift(depth: float, replay: float) -> None:
    alerts = told([turn(SHIFT), *looks([1.5 + depth] * 30)])
    assert alerts[0].diagnosis == "forgetting" and alerts[0].title == "english is likely being forgotten"
    first = alerts[0].remedies[0]
    assert first.change == {"data.replay": replay} and f"before step {SHIFT}" in first.text
    assert first.source == "Ibrahim et al. 2024, arXiv 2403.08763"
    assert any("close to that of the first phase" in r.text for r in alerts[0].remedies)


def test_a_gap_that_turns_out_to_be_forgetting_is_told_again_under_its_name() -> None:
    frames = [turn(SHIFT), *looks([1.6] * 50), *looks([1.6] * 20, begin=SHIFT + 50, every=10)]
    first, second = told(frames)
    assert (first.diagnosis, first.severity) == ("stability gap", "warning")
    assert (second.status, second.diagnosis, second.severity) == ("escalated", "forgetting", "critical")
    assert first.id == second.id


def test_gradients_are_evidence_and_never_an_alarm() -> None:
    tasks = Cells.along("task", ["english"])
    pull = {"gradient_ratio": [19.0], "gradient_cosine": [-0.3]}
    readings = {f"stability/{n}": reading(n, v, tasks) for n, v in pull.items()}
    gradients = Frame(SHIFT, "active", readings, RunInfo())
    assert told([turn(SHIFT), gradients, *looks([1.5] * 20)]) == []
    alert = told([turn(SHIFT), gradients, *looks([1.9] * 20)])[0]
    assert "19 times that of english" in alert.evidence and "cosine -0.3" in alert.evidence


def test_chance_is_ruled_out_by_a_number() -> None:
    alert = told([turn(SHIFT), *looks([1.7] * 20)])[0]
    assert alert.ruled_out == ("chance: an evaluation varies by 0.002, and this is 100 times that",)
    assert np.isclose(alert.value, 0.2)
