"""What a baseline knows of its run, and rings that give values back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rules.frames import frame, reading
from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal
from traindiag.rules.baseline import LR_JUMP, Course, Past
from traindiag.rules.spike import Spike


def course(rates: list[float], run: RunInfo | None = None) -> tuple[Course, list[bool], list[int]]:
    """The course, whether each frame is warm-up, and where the rate jumps."""
    made = Course()
    turns = [made.follow(frame(i, run=run, learning_rates={"adam": rate})) for i, rate in enumerate(rates)]
    return made, [t.warming for t in turns], [i for i, t in enumerate(turns) if t.jumped]


def test_warm_up_is_read_off_the_rate_where_the_run_does_not_say() -> None:
    line = [i / 100 for i in range(100)]
    cosine = [math.cos(i / 200) for i in range(100)]
    _, warming, jumps = course([*line, 1.0, *cosine])
    assert warming == [False, *[True] * 100, *[False] * 100]  # nobody knows at the first frame
    assert not jumps
    _, warming, _ = course([*cosine[:50], *line])  # a rise later on is none
    assert not any(warming)
    _, warming, _ = course([1.0] * 10, RunInfo(warmup=4))
    assert warming == [True] * 4 + [False] * 6


def test_jumps_of_the_rate() -> None:
    assert course([1.0, 1.0, 0.1, 0.1])[2] == [2]
    assert course([1.0, 0.5, 0.5, 1.0])[2] == [1, 3]
    assert course([1.0, 1.0, 0.0, 0.0, 1.0])[2] == [2, 4]
    assert course([1.0, 1.0 / (LR_JUMP * 0.99)])[2] == []
    made = Course()
    for i, rates in enumerate([{"a": 1.0, "b": 1.0}, {"a": 1.0}, {"a": 1.0, "b": 0.1}]):
        turn = made.follow(frame(i, learning_rates=rates))
    assert turn.jumped == ("b",)  # an optimizer that rests keeps its rate


def test_a_resume_is_no_turn_and_steps_taken_back_are_told() -> None:
    made = Course()
    told = [
        made.follow(frame(step, segment=s)).back_to for step, s in [(0, 0), (1, 0), (2, 1), (3, 1), (2, 2), (2, 3)]
    ]
    assert told == [None, None, None, None, 2, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.lists(st.booleans(), min_size=3, max_size=3)),
            st.tuples(st.just("back"), st.integers(0, 8)),
            st.tuples(st.just("forget"), st.lists(st.booleans(), min_size=3, max_size=3)),
            st.tuples(st.just("carry"), st.none()),
        ),
        max_size=40,
    )
)
def test_a_ring_holds_what_lists_hold(actions: list[tuple[str, object]]) -> None:
    past, lists, step = Past("*", 5), [[], [], []], 0  # type: ignore[var-annotated]
    past.align(reading([0.0] * 3))
    for action, given_ in actions:
        if action == "push":
            values = np.arange(3) + 10.0 * step
            past.push(values, np.flatnonzero(given_), step)  # type: ignore[arg-type]
            for i in np.flatnonzero(given_):  # type: ignore[arg-type]
                lists[i] = [*lists[i], (step, values[i])][-5:]
            step += 1
        elif action == "back":
            step = max(step - int(given_), 0)  # type: ignore[call-overload]
            had = past.take_back(step)
            assert had.tolist() == [any(s >= step for s, _ in one) for one in lists]
            lists = [[(s, v) for s, v in one if s < step] for one in lists]
        elif action == "forget":
            past.forget(np.array(given_))
            lists = [[] if gone else one for gone, one in zip(given_, lists)]  # type: ignore[call-overload]
        else:
            again = Past("*", 5)
            again.load_state_dict(past.state_dict())
            past = again
            past.align(reading([0.0] * 3))
        for i, one in enumerate(lists):
            shown = past.last(5)[:, i]
            assert [v for v in shown if not np.isnan(v)] == [v for _, v in one]
            assert not np.isnan(shown[5 - len(one) :]).any()


def test_a_ring_of_another_length_begins_anew() -> None:
    old = Past("*", 5)
    old.align(reading([0.0]))
    for step in range(7):
        old.push(np.ones(1), np.array([0]), step)
    new = Past("*", 9)
    new.load_state_dict(old.state_dict())
    assert new["count"].tolist() == [0]


def test_only_the_cells_of_the_optimizer_whose_rate_jumps_begin_anew() -> None:
    signal, rule = Signal("user/x", ("optimizer",), "a number of each optimizer"), Spike("user/x")
    cells = Cells(("optimizer",), (("critic",), ("actor",)))
    for step in range(30):
        rates = {"critic": 1.0, "actor": 1.0 if step < 20 else 0.1}
        values = [1.0, 1.0 if step < 20 else 10.0]
        assert not rule.update(frame(step, reading(values, signal, cells), learning_rates=rates))
    assert rule._table["count"].tolist() == [30, 10]


@pytest.mark.parametrize("rates", [{}, {"adam": 1e-3}])
def test_runs_without_a_schedule_have_no_turns(rates: dict[str, float]) -> None:
    made = Course()
    for step in range(20):
        assert made.follow(frame(step, learning_rates=rates)) == (False, (), None)
