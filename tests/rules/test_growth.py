"""Growth over a cell's own early level."""

import math

import pytest

from tests.rules.frames import active_at, feed, frame, reading
from traindiag.record.run_info import RunInfo
from traindiag.rules.growth import Growth


def test_growth_is_told_when_it_has_lasted_and_ends_when_half_of_it_is_gone() -> None:
    rule = Growth("user/x", factor=4.0, samples=2, persistence=2)
    said = feed(rule, [1.0, 1.0, 2.0, 5.0, 5.0, 3.0, 1.9])
    assert active_at(said) == [4]
    assert said[5] is None  # neither above the limit nor back
    assert said[6] is not None and not said[6].active and "back at 1.9" in said[6].evidence


def test_one_outlier_says_nothing_and_a_hole_is_none() -> None:
    rule = Growth("user/x", factor=4.0, samples=2, persistence=2)
    assert active_at(feed(rule, [1.0, 1.0, 90.0, 1.0, math.nan, 90.0, math.inf, 0.0, 1.0, 9.0, 9.0])) == [10]


def test_a_run_that_begins_large_is_held_against_itself() -> None:
    assert active_at(feed(Growth("user/x", factor=4.0, samples=2, persistence=1), [1e4] * 9)) == []


def test_the_level_after_warm_up_is_taken_where_asked_for() -> None:
    series = [1.0] * 5 + [10.0] * 5 + [30.0] * 5
    at_first = Growth("user/x", factor=4.0, samples=2, persistence=2)
    settled = Growth("user/x", factor=4.0, samples=2, persistence=2, settled=True)
    run = RunInfo(warmup=5)
    assert active_at(feed(at_first, series, run=run)) == [6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert active_at(feed(settled, series, run=run)) == []


def test_critical_and_above() -> None:
    rule = Growth("user/x", factor=2.0, critical_factor=8.0, above=5.0, samples=1, persistence=1)
    said = feed(rule, [1.0, 3.0, 6.0, 9.0])
    assert active_at(said) == [2, 3]
    assert [v.severity for v in said[2:] if v] == ["warning", "critical"] and said[3] is not None
    assert said[3].limit == pytest.approx(8.0)


def test_a_share_of_the_cells_must_have_grown() -> None:
    def told(share: float) -> bool:
        rule = Growth("user/x", factor=2.0, samples=1, persistence=1, share=share)
        rule.update(frame(0, reading([1.0, 1.0, 1.0, 1.0])))
        return bool(rule.update(frame(1, reading([9.0, 1.0, 1.0, 1.0]))))

    assert told(0.0) and told(0.25) and not told(0.5)


def test_without_the_signal_that_it_warns_with_it_takes_notes() -> None:
    rule = Growth("activation/rms", factor=2.0, samples=1, persistence=1, warns_with="output/log_z")
    severities = []
    for step, value in enumerate([1.0, 3.0, 3.0, 3.0]):
        readings = [reading([value], "activation/rms")] + [reading([5.0], "output/log_z")] * (step == 2)
        severities += [v.severity for v in rule.update(frame(step, *readings))]
    assert severities == ["info", "warning", "warning"]


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.0}, {"critical_factor": 1.5}, {"share": 1.5}, {"samples": 0}, {"persistence": 0}]
)
def test_wrong_arguments_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Growth("user/x", **{"factor": 2.0, **wrong})  # type: ignore[arg-type]
