"""Gaps are told after a shift, with a call, told again where it was wrong, and end where they have closed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.rules.rule import Verdict
from traindiag.rules.stability import TaskGap

SHIFT = 1000
NOISE = 0.002


def reading(name: str, values: Sequence[float], cells: Cells) -> Reading:
    return Reading(BY_NAME[f"stability/{name}"], cells, np.float32(values), ~np.isnan(values))


def turn(step: int, reason: str = "python") -> Frame:
    marked = reading("shift", [1.0], Cells.along("reason", [reason]))
    return Frame(step, "fast", {marked.signal.name: marked}, RunInfo())


def looks(
    losses: Iterable[float], begin: int = SHIFT, every: int = 1, name: str = "loss", level: float = 1.5
) -> list:
    """Frames of evaluations after a shift at ``SHIFT``."""
    cells = Cells.along("task", ["english"])
    frames = []
    for i, loss in enumerate(losses):
        known = {name: loss, "baseline": level, "noise": NOISE}
        readings = [reading(n, [v], cells) for n, v in known.items()]
        frames.append(Frame(begin + i * every, "active", {r.signal.name: r for r in readings}, RunInfo()))
    return frames


def said(frames: Iterable[Frame], rule: TaskGap | None = None) -> list[Verdict]:
    rule = rule or TaskGap()
    return [verdict for frame in frames for verdict in rule.update(frame)]


def passing(depth: float, steps: int = 60) -> list[float]:
    return [1.5 + depth * (1 - np.exp(-t / 3)) * np.exp(-max(0, t - 5) / 8) for t in range(steps)]


def test_a_gap_that_passes_is_told_with_the_fifth_evaluation_and_is_over_when_it_has_closed() -> None:
    verdicts = said([turn(SHIFT), *looks(passing(0.09))])
    first, last = verdicts[0], verdicts[-1]
    assert (first.step, first.kind, first.severity) == (SHIFT + 4, "gap", "warning")
    assert "english" in str(first.cell) and first.limit == pytest.approx(0.03)
    assert "(python)" in first.evidence and first.evidence.endswith("likely to pass")
    assert not last.active and all(v.active for v in verdicts[:-1])
    assert {v.severity for v in verdicts[:-1]} == {"warning"}


def test_without_a_shift_nothing_is_told() -> None:
    assert said(looks([1.5, 2.0, 3.0, 4.0] * 5)) == []


def test_what_is_within_the_limit_is_no_gap() -> None:
    assert said([turn(SHIFT), *looks([1.5 + 0.029] * 60)]) == []
    one = [1.5] * 10 + [1.7] + [1.5] * 10  # a single evaluation is none either
    assert said([turn(SHIFT), *looks(one)]) == []


def test_forgetting_is_called_so_and_is_critical_where_it_is_deep_or_certain() -> None:
    deep = [1.5 + 0.4 * (1 - np.exp(-t / 3)) for t in range(50)]
    verdicts = said([turn(SHIFT), *looks(deep)])
    assert (verdicts[0].step, verdicts[0].kind, verdicts[0].severity) == (SHIFT + 4, "likely forgetting", "warning")
    assert verdicts[-1].severity == "critical"  # 27 %
    shallow = said([turn(SHIFT), *looks([1.5 + 0.1] * 50), *looks([1.6] * 46, begin=SHIFT + 50, every=10)])
    assert (shallow[0].kind, shallow[0].severity) == ("gap", "warning")
    assert (shallow[-1].step, shallow[-1].kind, shallow[-1].severity) == (SHIFT + 500, "forgetting", "critical")


def test_a_call_that_does_not_hold_is_told_again_after_five_evaluations() -> None:
    steady = [*looks([1.6] * 50), *looks([1.6] * 20, begin=SHIFT + 50, every=10)]
    verdicts = said([turn(SHIFT), *steady])
    worse = next(v for v in verdicts if v.severity == "critical")
    before = [v for v in verdicts if v.step < worse.step]
    assert worse.kind == "likely forgetting" and {v.severity for v in before} == {"warning"}
    assert [v.kind for v in before][-4:] == ["likely forgetting"] * 4 and before[0].kind == "gap"


def test_half_of_it_back_is_partly_forgotten() -> None:
    halfway = [*looks([1.9] * 50), *looks([1.66] * 46, begin=SHIFT + 50, every=10)]
    last = said([turn(SHIFT), *halfway])[-1]
    assert last.kind == "partial" and "60% of it back after 500 steps" in last.evidence


def test_shares_are_judged_in_points() -> None:
    frames = [turn(SHIFT), *looks([0.5] * 5 + [0.47] * 10, name="value", level=0.5)]
    assert said(frames)[0].severity == "info"  # 3 points, though 6 % of the level
    frames = [turn(SHIFT), *looks([50.0] * 5 + [47.0] * 10, name="value", level=50.0)]
    assert said(frames)[0].severity == "warning"


def test_the_next_shift_ends_what_is_open() -> None:
    frames = [turn(SHIFT), *looks([1.7] * 10), turn(SHIFT + 10, "c")]
    verdicts = said(frames)
    assert not verdicts[-1].active and verdicts[-1].step == SHIFT + 10


def test_the_worst_of_several_tasks_speaks() -> None:
    cells = Cells.along("task", ["a", "b", "c"])
    rule = TaskGap()
    rule.update(turn(SHIFT))
    for step in range(SHIFT, SHIFT + 8):
        known = {"loss": [1.6, 2.5, np.nan], "baseline": [1.5, 1.5, np.nan], "noise": [NOISE, NOISE, np.nan]}
        readings = [reading(n, v, cells) for n, v in known.items()]
        frame = Frame(step, "active", {r.signal.name: r for r in readings}, RunInfo())
        verdicts = rule.update(frame)
    assert str(verdicts[0].cell) == "b" and verdicts[0].others == 1 and verdicts[0].severity == "critical"


@pytest.mark.parametrize("cut", [0, 1, 5, 30, 55])
def test_a_resumed_rule_says_what_an_unbroken_one_does(cut: int) -> None:
    frames = [turn(SHIFT), *looks(passing(0.3))]
    first, second = TaskGap(), TaskGap()
    begun = said(frames[:cut], first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + said(frames[cut:], second) == said(frames)


def test_wrong_depths_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rise must be two positive depths, the smaller one first, got \(0.3, 0.1\)"
    ):
        TaskGap(rise=(0.3, 0.1))
