"""A gradient that is zero by construction says nothing until it comes alive; one that falls to zero does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rules.frames import frame, reading
from tests.rules.test_resume_anywhere import carried
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.rules.alive import Alive, StructuralZeros, idle_members


def cells(*names: str, optimizer: str = "adam") -> Cells:
    return Cells(("optimizer", "parameter"), tuple((optimizer, name) for name in names))


def rms(step: int, *values: float, seen: Sequence[bool] | None = None, of: Cells | None = None) -> Frame:
    of = of or cells(*(f"p{i}" for i in range(len(values))))
    return frame(step, reading(values, "gradient/rms", of, seen))


def judged(rows: Sequence[Sequence[float]], alive: Alive | None = None) -> list[list[bool]]:
    alive, of = alive or Alive(), cells(*(f"p{i}" for i in range(len(rows[0]))))
    return [alive.among(rms(step, *row), of).tolist() for step, row in enumerate(rows)]


def test_a_zero_from_the_start_is_left_out_until_it_has_lived_for_three_samples() -> None:
    second = [0, 0, 1e-4, 0, 1e-4, 1e-4, 1e-4, 0]
    assert [row[1] for row in judged([[1.0, v] for v in second])] == [False] * 6 + [True] * 2


def test_what_was_alive_and_falls_to_zero_is_judged() -> None:
    assert judged([[1.0, 1e-3], [1.0, 0.0], [1.0, 0.0]]) == [[True, True]] * 3


@pytest.mark.parametrize(("share", "lives"), [(1.1e-8, False), (9e-7, False), (1.1e-6, True), (1e-3, True)])
def test_round_off_is_relative_to_the_largest_of_the_same_optimizer(share: float, lives: bool) -> None:
    of = Cells(("optimizer", "parameter"), (("a", "big"), ("a", "key.bias"), ("b", "small")))
    found = Alive().among(rms(0, 1e-2, 1e-2 * share, 1e-12, of=of), of)
    assert found.tolist() == [True, lives, True]  # small, but the largest of its own optimizer


def test_nan_is_no_zero_and_does_not_hide_the_largest() -> None:
    assert judged([[np.nan, 1.0, 1e-9]]) == [[True, True, False]]
    assert judged([[np.inf, 1.0, 1e-3]]) == [[True, True, True]]


def test_a_cell_that_was_not_seen_has_not_begun() -> None:
    alive, of = Alive(), cells("p0", "p1")
    assert alive.among(rms(0, 1.0, 0.0, seen=[True, False]), of).tolist() == [True, True]
    assert alive.among(rms(1, 1.0, 0.0), of).tolist() == [True, False]


def test_exact_zeros_are_known_where_gradients_are_seen_after_clipping_only() -> None:
    alive, of = Alive(), cells("a", "b")
    made = frame(0, reading([0.3, 1.0], "gradient/zero_fraction", of))
    assert alive.among(made, of).tolist() == [True, False]


def test_a_frame_counts_once_and_other_cells_are_judged() -> None:
    alive = Alive(samples=2)
    alive.look(rms(0, 1.0, 0.0))
    for _ in range(5):
        assert alive.among(rms(1, 1.0, 0.5), cells("p1", "new")).tolist() == [False, True]
    assert alive.among(rms(2, 1.0, 0.5), cells("p1", "new")).tolist() == [True, True]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, float("nan")]), min_size=3, max_size=3), max_size=12)
)
def test_against_a_loop_over_cells(rows: list[list[float]]) -> None:
    expected = []
    history: list[list[bool]] = [[], [], []]
    for row in rows:
        largest = max([v for v in row if v == v], default=0.0)
        for i, value in enumerate(row):
            history[i].append(not (value <= 1e-6 * largest))
        streaks = [any(all(h[j : j + 3]) and len(h[j : j + 3]) == 3 for j in range(len(h))) for h in history]
        expected.append([h[0] or awake for h, awake in zip(history, streaks)])
    assert (judged(rows) if rows else []) == expected


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_resumed_run_goes_on_where_it_was(cut: int) -> None:
    rows = [[1.0, v] for v in (0, 1e-3, 1e-3, 0, 1e-3, 1e-3, 1e-3, 0)]
    first, second, rule, resumed = Alive(), Alive(), StructuralZeros(), StructuralZeros()
    judged(rows[:cut], first)
    second.load_state_dict(carried(first.state_dict()))
    of = cells("p0", "p1")
    after = [second.among(rms(s, *row), of).tolist() for s, row in enumerate(rows) if s >= cut]
    assert after == judged(rows)[cut:]
    whole = [rule.update(rms(s, *row)) for s, row in enumerate(rows)]
    again = StructuralZeros()
    for s, row in enumerate(rows[:cut]):
        again.update(rms(s, *row))
    resumed.load_state_dict(carried(again.state_dict()))
    assert [resumed.update(rms(s, *row)) for s, row in enumerate(rows) if s >= cut] == whole[cut:]


def test_sleepers_are_named_once_together_with_idle_experts_until_all_are_awake() -> None:
    rule, of = StructuralZeros(), cells("w", "k.bias", "experts.0.w", "experts.1.w")
    told = []
    for step in range(6):
        key = 0.0 if step < 2 else 1e-3
        idle = step < 3
        made = [
            reading([1.0, key, 1.0, 1.0], "gradient/rms", of, [True, True, True, not idle]),
            reading([0, 0, 0, float(idle)], "wiring/ungraded", of),
        ]
        told += [(v.step, v.active, v.severity, v.evidence) for v in rule.update(frame(step, *made))]
    assert told[0] == (
        0, True, "info", "2 parameters get no gradient so far: k.bias, experts.1.w; left out until they come alive"
    )  # fmt: skip
    assert [(step, active) for step, active, _, _ in told] == [(0, True), (1, True), (2, True), (3, True), (4, False)]
    assert "1 parameter gets no gradient so far: k.bias" in told[3][3]


def test_layers_of_a_chain_are_no_experts() -> None:
    names = [
        "net.0.w",
        "net.2.w",
        "blocks.0.moe.experts.0.w1",
        "blocks.0.moe.experts.1.w1",
        "blocks.0.moe.experts.1.w2",
    ]
    of = cells(*names, "only.experts.0.w")
    idle = idle_members(of, np.array([False, True, False, True, True, True]))
    assert idle.tolist() == [False, False, False, True, True, False]  # of the last list none is used: a fault
    half = idle_members(of, np.array([False, False, False, False, True, False]))
    assert not half.any()  # the expert was used, and one of its tensors has no gradient


def test_arguments() -> None:
    with pytest.raises(ValueError, match="samples must be an integer of at least 1, got 0"):
        Alive(samples=0)
    assert torch.tensor(Alive().floor) > 0
