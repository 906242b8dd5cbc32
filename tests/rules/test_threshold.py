"""A limit, against a per-cell state machine written in plain Python."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rules.frames import X, active_at, feed, frame, reading
from traindiag.record.cells import Cells
from traindiag.rules.threshold import Threshold

_VALUES = st.sampled_from([-math.inf, -3.0, 0.0, 4.0, 4.5, 5.0, 5.5, 9.0, 9.5, 10.0, 10.5, 30.0, math.inf, math.nan])


class PlainCell:
    """One cell of ``below=5, above=10``: 9 and 5.5 are the levels at which a crossing is over."""

    def __init__(self, persistence: int) -> None:
        self.persistence, self.count, self.active = persistence, 0, False

    def see(self, value: float) -> bool:
        """Whether the value was judged."""
        if value > 10 or value < 5:
            self.count += 1
        elif math.isfinite(value):
            self.count = 0
            self.active = self.active and not 5.5 <= value <= 9
        else:
            return False
        self.active = self.active or self.count >= self.persistence
        return True


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.lists(st.tuples(st.booleans(), _VALUES), min_size=3, max_size=3), min_size=1, max_size=12),
)
def test_every_cell_is_a_state_machine_of_its_own(persistence: int, rows: list[list[tuple[bool, float]]]) -> None:
    rule = Threshold("user/x", above=10.0, below=5.0, critical_above=20.0, persistence=persistence)
    cells, plain, was_open = Cells.along("place", "abc"), [PlainCell(persistence) for _ in range(3)], False
    for step, row in enumerate(rows):
        seen, values = [s for s, _ in row], [v for _, v in row]
        judged = [s and c.see(v) for c, s, v in zip(plain, seen, values)]
        got = rule.update(frame(step, reading(values, X, cells, seen)))
        failing = [v for c, j, v in zip(plain, judged, values) if j and c.active]
        if failing:
            critical = [v for v in failing if v > 20]
            worst = max(critical or failing) if max(critical or failing) > 7.5 else min(failing)
            (verdict,) = got
            assert verdict.active
            assert verdict.value == worst
            assert verdict.others == len(failing) - 1
            assert verdict.severity == ("critical" if critical else "warning")
        elif was_open and not any(c.active for c in plain):
            assert [v.active for v in got] == [False]
            was_open = False
        else:
            assert not got
        was_open = was_open or bool(failing)


def test_persistence_counts_samples_and_an_unseen_cell_keeps_its_count() -> None:
    rule, cells = Threshold("user/x", above=1.0, persistence=3), Cells.along("place", "ab")
    rows = [([2, 2], [True, True]), ([0, 2], [True, False]), ([2, 2], [True, True]), ([0, 2], [True, True])]
    said = [rule.update(frame(i, reading(v, X, cells, s))) for i, (v, s) in enumerate(rows)]
    assert [len(s) for s in said] == [0, 0, 0, 1]
    assert str(said[3][0].cell) == "b"


def test_a_value_that_hovers_at_the_limit_does_not_flap() -> None:
    said = feed(Threshold("user/x", above=100.0), [101, 99, 101, 95, 101, 89, 99])
    assert [None if v is None else v.active for v in said] == [True, True, True, True, True, False, None]


def test_infinity_is_beyond_and_nan_is_somebody_elses_business() -> None:
    assert active_at(feed(Threshold("user/x", above=1.0), [math.nan, -math.inf, math.inf, 0.0])) == [2]
    assert active_at(feed(Threshold("user/x", below=1.0), [math.nan, math.inf, -math.inf, 2.0])) == [2]
    # Neither healthy: a NaN between two crossings does not end the count.
    assert active_at(feed(Threshold("user/x", above=1.0, persistence=2), [2.0, math.nan, 2.0])) == [2]


def test_a_logged_limit_is_not_beyond_itself() -> None:
    assert active_at(feed(Threshold("user/x", above=0.1), [0.1, 0.1000001])) == [1]


def test_below_tells_the_smallest() -> None:
    (verdict,) = Threshold("user/x", below=0.5, critical_below=0.1).update(frame(0, reading([0.4, 0.05, 0.9])))
    assert (str(verdict.cell), verdict.severity, verdict.limit, verdict.others) == ("place1", "critical", 0.1, 1)


@pytest.mark.parametrize(
    ("where", "hit"), [("blocks.1.*", 1), ("* head 3", 0), ("7", 1), ("blocks.0.attn head 3", 0), ("BLOCKS*", None)]
)
def test_where_is_a_glob_over_the_label_or_one_coordinate(where: str, hit: int | None) -> None:
    cells = Cells(("layer", "head"), (("blocks.0.attn", 3), ("blocks.1.attn", 7)))
    rule = Threshold("attention/logit_range", above=1.0, where=where)
    got = rule.update(frame(0, reading([5, 5], "attention/logit_range", cells)))
    assert [v.cell.coordinates for v in got] == ([] if hit is None else [cells.coordinates[hit]])


def test_a_level_that_the_run_brought_along_is_told_as_info_and_judged_by_growth() -> None:
    rule = Threshold("user/x", above=1e3, critical_above=1e4, inherit=True)
    said = feed(rule, [2300, 2500, 9000, 22_000, 24_000, 2400, 800])
    assert [None if v is None else (v.active, v.severity) for v in said] == [
        *[(True, "info")] * 4, (True, "critical"), (True, "info"), (False, "warning"),
    ]  # fmt: skip
    assert said[0] is not None
    assert "inherited" in said[0].evidence
    # Near the limit counts as brought along; a young run's growth does not.
    assert active_at(feed(Threshold("user/x", above=1e3, inherit=True), [950, 1050, 3000])) == [1, 2]
    assert [v.severity for v in feed(Threshold("user/x", above=1e3, inherit=True), [1, 1100]) if v] == ["warning"]
    assert [v.severity for v in feed(Threshold("user/x", above=1e3), [2300]) if v] == ["warning"]


def test_the_rank_of_the_worst_cell_is_told_when_cells_change_places() -> None:
    rule = Threshold("user/x", above=1.0)
    rule.update(frame(0, reading([0, 0], X, Cells.along("place", "ab"))))
    turned = reading([5, 0], X, Cells.along("place", "ba"))
    (verdict,) = rule.update(
        frame(1, type(turned)(X, turned.cells, turned.values, turned.seen, np.array([3, -1], np.int64)))
    )
    assert (str(verdict.cell), verdict.rank) == ("b", 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a limit"),
        ({"above": 1.0, "below": 2.0}, "smaller than above"),
        ({"above": math.nan}, "above must be a finite float32"),
        ({"above": 1e300}, "above must be a finite float32"),
        ({"above": 1.0, "critical_above": 0.5}, "critical_above must lie beyond"),
        ({"above": 1.0, "critical_below": 0.5}, "critical_below must lie beyond"),
        ({"above": 1.0, "persistence": 0}, "persistence must be an integer of at least 1, got 0"),
        ({"above": 1.0, "severity": "bad"}, "info, warning, critical"),
        ({"below": 1.0, "inherit": True}, "needs above > 0"),
    ],
)
def test_wrong_arguments_raise_with_value_and_expectation(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Threshold("user/x", **given)  # type: ignore[arg-type]


def test_a_misspelt_signal_lists_near_names() -> None:
    with pytest.raises(ValueError, match="Did you mean 'attention/max_logit'"):
        Threshold("attention/max_logits", above=1.0)


@pytest.mark.parametrize("inherit", [False, True])
def test_27_000_cells_cost_well_under_a_millisecond(inherit: bool) -> None:
    values = np.random.default_rng(0).uniform(0, 1, 27_000).tolist()
    values[5] = 3.0
    rule, made = Threshold("user/x", above=2.0, inherit=inherit), frame(0, reading(values))
    rule.update(made)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        rule.update(made)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_a_share_of_the_cells_must_be_beyond_it() -> None:
    rule = Threshold("user/x", above=1.0, share=0.5)
    assert rule.update(frame(0, reading([9.0, 0.0, 0.0, 0.0]))) == ()
    (told,) = rule.update(frame(1, reading([9.0, 9.0, 0.0, 0.0])))
    assert told.active and told.others == 1
    (over,) = rule.update(frame(2, reading([9.0, 0.0, 0.0, 0.0])))
    assert not over.active


def test_what_has_never_been_high_has_not_fallen() -> None:
    rule = Threshold("user/x", below=1.0, fallen_from=100.0)
    assert rule.update(frame(0, reading([0.5, 500.0]))) == ()
    (told,) = rule.update(frame(1, reading([0.5, 0.4])))
    assert told.cell.coordinates == ("place1",) and told.others == 0


def test_a_fall_needs_a_height() -> None:
    with pytest.raises(ValueError, match=r"fallen_from must lie above below, got fallen_from=0.5 with below=1"):
        Threshold("user/x", below=1.0, fallen_from=0.5)
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 2"):
        Threshold("user/x", above=1.0, share=2)


def test_what_joins_late_is_judged_once_it_has_been_inside() -> None:
    rule, cells = Threshold("user/x", above=1.0, waits=True), Cells.along("place", "abc")
    rows = [
        ([0.5, 0.0, 5.0], [True, False, True]),  # a limit that is passed from the first sample on is told
        ([0.5, 9.0, 0.5], [True, True, True]),
        ([0.5, math.nan, 0.5], [True, True, True]),
        ([0.5, 3.0, 0.5], [True, True, True]),
        ([0.5, 0.9, 0.5], [True, True, True]),
        ([0.5, 3.0, 0.5], [True, True, True]),
    ]
    said = [rule.update(frame(i, reading(v, X, cells, s))) for i, (v, s) in enumerate(rows)]
    assert [[str(v.cell) for v in found if v.active] for found in said] == [["c"], [], [], [], [], ["b"]]


def test_nan_is_no_part_of_a_share() -> None:
    rule, nan = Threshold("user/x", above=1.0, share=0.5), math.nan
    (told,) = rule.update(frame(0, reading([9.0, 0.0, nan, nan, nan])))
    assert told.active
    assert rule.update(frame(1, reading([nan] * 5))) == ()


def test_infinity_is_no_height_to_fall_from() -> None:
    rule = Threshold("user/x", below=1.0, fallen_from=100.0)
    assert active_at(feed(rule, [math.inf, 0.5, 200.0, 0.5])) == [3]


def test_a_parameter_of_a_resting_expert_is_below_nothing() -> None:
    names = [f"{part}.{i}.weight" for part in ("experts", "layers") for i in range(2)]
    rule, cells = Threshold("user/x", below=1.0), Cells.along("parameter", names)
    (told,) = rule.update(frame(0, reading([0.0, 5.0, 0.0, 5.0], X, cells)))
    assert str(told.cell) == "layers.0.weight" and told.others == 0


def _with_losses(rule: Threshold, losses: list[float], steps: int = 12) -> list[str]:
    said = []
    for step in range(steps):
        loss = losses[min(step, len(losses) - 1)]
        fast = frame(step, reading([loss], "loss/value", Cells.along("optimizer", ["adam"])), lane="fast")
        slow = frame(step, reading([1e-3], "optimizer/grad_rms_over_eps", Cells.along("parameter", ["w"])))
        said += [v.evidence for f in (fast, slow) for v in rule.update(f) if v.active]
    return said


def test_where_all_is_learned_small_gradients_are_no_fault():
    def rule():
        return Threshold("optimizer/grad_rms_over_eps", below=0.1, left=0.02, persistence=2)

    assert _with_losses(rule(), [2.0]) and _with_losses(rule(), [2.0, 1.9, 1.8, 0.1])
    assert _with_losses(rule(), [2.0] * 3 + [0.01], steps=7)  # eight losses count, not one
    assert len(_with_losses(rule(), [2.0] * 3 + [0.01], steps=40)) < 10  # and then it is over
    assert _with_losses(rule(), [np.nan]) and _with_losses(rule(), [-1.0])  # nothing is known of what is left
    with pytest.raises(ValueError, match="left must be between 0 and 1, got 2"):
        Threshold("optimizer/grad_rms_over_eps", below=0.1, left=2)


def test_what_is_left_to_learn_survives_a_resume():
    rule = Threshold("optimizer/grad_rms_over_eps", below=0.1, left=0.02)
    again = Threshold("optimizer/grad_rms_over_eps", below=0.1, left=0.02)
    cells = Cells.along("optimizer", ["adam"])
    for step, loss in enumerate([2.0] * 3 + [0.01] * 8):
        rule.update(frame(step, reading([loss], "loss/value", cells), lane="fast"))
    again.load_state_dict(rule.state_dict())
    small = frame(11, reading([1e-3], "optimizer/grad_rms_over_eps", Cells.along("parameter", ["w"])))
    assert rule.update(small) == again.update(small) == ()
    assert Threshold("optimizer/grad_rms_over_eps", below=0.1).update(small)
