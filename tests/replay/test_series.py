"""Plain series are judged as a run that had measured them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traindiag import Frame, NonFinite, Rule, RunInfo, Spike, Threshold, Verdict, replay_series
from traindiag.playback.series import Column, frames_of
from traindiag.record.run_info import OptimizerInfo

NORMS = [1.0, 1.1, 0.9, 1.0, 1.0, 9.0]


def told(series: Mapping[str, Any], **keywords: Any) -> list[tuple[str, int, str]]:
    return [(a.rule, a.step, a.where) for a in replay_series(series, **keywords) if a.status == "opened"]


class Pandas:
    """A pandas Series, as far as one is looked at."""

    def __init__(self, values: list[float], index: Any) -> None:
        self.values, self.index = values, index

    def to_numpy(self) -> np.ndarray[Any, Any]:
        return np.array(self.values)


JUMP = "gradient/norm-spike"


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (NORMS, 15),
        (tuple(NORMS), 15),
        (np.array(NORMS), 15),
        (np.array(NORMS)[:, None], 15),
        (dict(zip((0, 1, 5, 6, 7, 20), NORMS)), 20),
        (Pandas(NORMS, range(6)), 15),  # counts from 0: no steps
        (Pandas(NORMS, [2, 3, 5, 8, 9, 11]), 11),
        (Pandas(NORMS, ["a", "b", "c", "d", "e", "f"]), 15),
        ([1.0, None, 1.0, 1.0, 1.0, 9.0], 15),
    ],
)
def test_every_kind_of_series(values: Any, step: int) -> None:
    expected = "optimizer 0" if getattr(values, "ndim", 1) == 2 else ""
    assert told({"gradient/norm": values}, every=3) == [(JUMP, step, expected)]


def test_cells_of_one_and_of_two_axes() -> None:
    logits = np.ones((5, 2, 3))
    logits[3, 1, 2] = 2e3
    assert told({"attention/logit_range": logits}) == [("attention/logit-range", 3, "layer 1 head 2")]
    assert told({"attention/logit_range": logits.max(axis=1)}) == [("attention/logit-range", 3, "head 2")]
    assert told({"attention/logit_range": logits.max(axis=(1, 2))}) == [("attention/logit-range", 3, "")]
    rules = [Threshold("reward/kl", above=10.0)]
    assert told({"reward/kl": logits[:, :, 2]}, rules=rules) == [("reward/kl above 10", 3, "cell 1")]
    with pytest.raises(ValueError, match="has the axes"):
        replay_series({"loss/value": logits})


def test_nan_is_a_result_and_none_is_not() -> None:
    assert told({"loss/value": [1.0, None, 2.0]}) == []
    (alert,) = replay_series({"loss/value": [1.0, math.nan, 2.0]}, rules=[NonFinite()])
    assert (alert.step, alert.severity) == (1, "critical")


def test_rules_are_not_changed_by_what_they_judge() -> None:
    rule = Spike("gradient/norm", name="mine")
    for _ in range(2):
        assert told({"gradient/norm": NORMS}, rules=[rule]) == [("mine", 5, "")]
    assert told({"gradient/norm": [9.0]}, rules=[rule]) == []


class Rate(Rule):
    name, signals = "rate", ("loss/value",)

    def update(self, frame: Frame) -> list[Verdict]:
        return [Verdict(self.name, "rate", "loss/value", frame.step, evidence=str(dict(frame.learning_rates)))]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def test_learning_rates_and_facts_reach_rules_and_remedies() -> None:
    run = RunInfo(run_id="r", length=1000, optimizers=(OptimizerInfo("adam", "AdamW", {"lr": 0.5}),))
    (alert,) = replay_series({"loss/value": {3: 1.0}, "learning_rate": {1: 0.25, 4: 0.5}}, [Rate()], run)
    assert alert.evidence == "{'adam': 0.25}" and alert.run == "r"
    growing = {"attention/logit_range": [8.0 * 2**i for i in range(7)]}
    (warning,) = [a for a in replay_series(growing, run=run, every=10) if a.kind == "forecast"]
    assert any("from 0.5 to" in r.text for r in warning.remedies)
    late = RunInfo(length=61)  # the run is over before the limit
    assert [a for a in replay_series(growing, run=late, every=10) if a.kind == "forecast"] == []


def test_of_a_step_the_fast_lane_comes_first() -> None:
    columns = [Column.of("attention/logit_range", {0: 1.0, 2: 1.0}), Column.of("loss/value", [1.0, 2.0, 3.0])]
    found = [(f.step, f.lane, list(f.readings)) for f in frames_of(columns, RunInfo())]
    slow, fast = ["attention/logit_range"], ["loss/value"]
    assert found == [(0, "fast", fast), (0, "slow", slow), (1, "fast", fast), (2, "fast", fast), (2, "slow", slow)]


@pytest.mark.parametrize(
    ("series", "every", "message"),
    [
        ({"gradient/nrm": [1.0]}, 1, "Did you mean 'gradient/norm'"),
        ({"loss/value": {3: 1.0, 2: 1.0}}, 1, "steps must grow, got 2"),
        ({"loss/value": {-1: 1.0}}, 1, "count from 0"),
        ({"loss/value": ["x"]}, 1, "expected numbers"),
        ({"loss/value": [[1.0], [1.0, 2.0]]}, 1, "expected numbers"),
        ({"loss/value": np.float64(1.0)}, 1, "expected numbers"),
        ({"loss/value": [1.0]}, 0, "at least 1"),
    ],
)
def test_what_is_no_series_is_told(series: Any, every: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay_series(series, every=every)
    assert replay_series({"loss/value": []}) == []


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['lightning'] = sys.modules['pandas'] = None\n"
        "import traindiag; print(len(traindiag.replay_series({'loss/value': [1.0, float('nan')]})))\n"
        "from traindiag.playback import check, show"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == "1\n"
