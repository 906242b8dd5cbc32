"""What may wait and what may not."""

import json
import math

import pytest

from traindiag.transfer.screen import Screen


def watching(*levels: float) -> Screen:
    screen = Screen()
    screen.lay_out([(f"total {i}", 1) for i in range(len(levels))])
    assert screen.stirs(levels)  # what was never seen cannot wait
    return screen


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stirs_and_leaves_the_level_alone(bad: float) -> None:
    screen = watching(2.0, 5.0)
    for _ in range(3):
        assert screen.stirs([2.0, bad])
    assert not screen.stirs([2.0, 5.0])


def test_a_bad_number_in_the_middle_of_a_part_stirs() -> None:
    screen = Screen()
    screen.lay_out([("loss", 1), ("squares", 3)])
    screen.stirs([1.0, 1.0, 2.0, 3.0])
    assert not screen.stirs([1.0, 3.0, 2.0, 1.0])
    assert screen.stirs([1.0, 1.0, math.nan, 3.0])
    assert screen.stirs([1.0, math.inf, -math.inf, 3.0])


@pytest.mark.parametrize("level", [1e-30, 1e-3, 1.0, 1e30, -2.0])
def test_twofold_is_calm_and_a_little_more_stirs(level: float) -> None:
    assert not watching(level).stirs([level * 1.999])
    assert watching(level).stirs([level * 2.001])


def test_squares_may_grow_fourfold() -> None:
    def grown(times: float) -> bool:
        screen = Screen()
        screen.lay_out([("gradient:true:squares", 1)])
        screen.stirs([3.0])
        return screen.stirs([3.0 * times])

    assert not grown(3.999) and grown(4.001)


def test_a_tenfold_norm_stirs_after_any_number_of_steps_that_halve_it() -> None:
    """The level follows a falling norm slowly; a tenfold norm is a hundredfold square and cannot hide behind it."""
    screen, square = watching(1.0), 1.0
    for _ in range(20):
        square /= 1.19  # the square falls by 2^2 in eight steps
        assert not screen.stirs([square])
        copy = Screen()
        copy.lay_out([("total 0", 1)])
        copy.load_state_dict(screen.state_dict())
        assert copy.stirs([square * 100])


def test_what_was_zero_stirs_when_it_no_longer_is_and_again_when_it_is_absent_for_long() -> None:
    screen = watching(0.0)
    assert not screen.stirs([0.0])
    assert screen.stirs([1.0])
    assert not screen.stirs([0.0])
    assert screen.stirs([1.0])


def test_levels_stay_with_their_names_through_a_wider_layout_and_a_checkpoint() -> None:
    screen = watching(2.0, 5.0)
    state = json.loads(json.dumps(screen.state_dict()))
    resumed = Screen()
    resumed.load_state_dict(state)
    resumed.lay_out([("total 1", 1), ("new", 2), ("total 0", 1)])
    assert resumed.stirs([5.0, 1.0, 1.0, 2.0])  # only for what is new
    assert not resumed.stirs([5.0, 1.0, 1.0, 2.0])
    assert resumed.state_dict() == {"total 0": 2.0, "total 1": 5.0, "new": 2.0}


def test_an_outlier_does_not_hide_the_next_one() -> None:
    """A mean that takes outliers in would stay above the second one for many steps."""
    screen = watching(1.0)
    assert screen.stirs([1e6])
    assert screen.stirs([100.0])
    assert not screen.stirs([1.0])
    assert screen.stirs([100.0])
