"""A series keeps absent apart from NaN, follows cells that come and go, and forgets rolled-back steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History, Series
from traindiag.record.signal import Signal

HEADS = Signal("attention/max_logit", ("layer", "head"), "largest logit")
LOWEST = Signal("attention/entropy", ("layer", "head"), "entropy", worst="min")
NAN = float("nan")


def reading(signal: Signal, measured: dict[tuple[str, int], float | None]) -> Reading:
    """None: not measured."""
    values = np.array([NAN if v is None else v for v in measured.values()], np.float32)
    seen = np.array([v is not None for v in measured.values()])
    return Reading(signal, Cells(("layer", "head"), tuple(measured)), values, seen)


cells = st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 2))
numbers = st.none() | st.floats(width=32) | st.sampled_from([NAN, math.inf, -math.inf])
samples = st.lists(st.tuples(st.integers(1, 5), st.dictionaries(cells, numbers, min_size=1)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(samples, st.sampled_from([HEADS, LOWEST]))
def test_it_holds_what_a_dictionary_would(samples, signal):
    series = Series(signal, Cells(("layer", "head"), tuple(samples[0][1])))
    expected: dict[int, dict[tuple[str, int], float | None]] = {}
    step = 0
    for gap, measured in samples:
        step += gap
        expected[step] = measured
        series.append(step, reading(signal, measured))

    assert series.steps.tolist() == list(expected)
    layers, heads = series.axis("layer"), series.axis("head")
    assert list(heads) == sorted(heads)
    grid, swapped = series.grid("layer", "head"), series.grid("head", "layer")
    assert grid.shape == (len(expected), len(layers), len(heads))
    assert np.array_equal(grid.mask, swapped.mask.transpose(0, 2, 1))
    worst_of = max if signal.worst == "max" else min
    for row, measured in enumerate(expected.values()):
        for i, layer in enumerate(layers):
            for j, head in enumerate(heads):
                value = measured.get((layer, head))
                assert grid.mask[row, i, j] == (value is None)
                if value is not None:
                    assert np.array_equal(grid.data[row, i, j], np.float32(value), equal_nan=True)
        found = [v for v in measured.values() if v is not None]
        worst = series.worst()[row]
        if not found:
            assert worst is np.ma.masked
        elif all(math.isfinite(v) for v in found):
            assert worst == np.float32(worst_of(found))
        else:
            assert not math.isfinite(worst)
            at = series.cells[int(series.worst_cells()[row])].coordinates
            assert not math.isfinite(measured[at])


def test_the_extreme_is_the_first_non_finite_number_or_the_largest():
    series = Series(HEADS, Cells(("layer", "head"), (("a", 0), ("a", 1))))
    assert series.extreme() is None
    series.append(0, reading(HEADS, {("a", 0): 3.0, ("a", 1): 7.0}))
    series.append(10, reading(HEADS, {("a", 0): 9.0, ("a", 1): None}))
    value, cell, step = series.extreme()
    assert (value, str(cell), step) == (9.0, "a head 0", 10)
    assert "2 samples x 2 cells, steps 0-10, worst 9 at a head 0, step 10" in repr(series)
    series.append(20, reading(HEADS, {("a", 1): NAN}))
    series.append(30, reading(HEADS, {("a", 0): math.inf}))
    value, cell, step = series.extreme()
    assert math.isnan(value)
    assert (str(cell), step) == ("a head 1", 20)


def test_arrays_handed_out_stay_as_they_were():
    history = History(max_samples=8)
    for step in range(5):
        history.add(step, reading(HEADS, {("a", 0): float(step)}))
    series = history["attention/max_logit"]
    steps, values = series.steps, series.values
    for step in range(5, 40):
        history.add(step, reading(HEADS, {("b", 1): float(step), ("a", 0): 0.0}))
    history.rollback(2)
    history.add(3, reading(HEADS, {("a", 0): -1.0}))
    assert steps.tolist() == [0, 1, 2, 3, 4]
    assert values.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_a_resumed_run_replaces_the_steps_it_goes_through_again():
    history = History()
    for step in range(10):
        history.add(step, reading(HEADS, {("a", 0): 1.0}))
    history.rollback(6)
    assert history["attention/max_logit"].steps.tolist() == list(range(7))
    for step in (4, 5):  # a step that is there already is a roll-back too
        history.add(step, reading(HEADS, {("a", 0): 2.0}), segment=1)
    series = history["attention/max_logit"]
    assert series.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert series.segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert series.values[:, 0].tolist() == [1, 1, 1, 1, 2, 2]
    history.rollback(-1)
    assert len(series) == 0
    assert series.extreme() is None


def test_an_axis_of_one_name_may_be_left_out_and_no_other():
    norms = Signal("gradient/parameter_norm", ("optimizer", "parameter"), "norm")
    one = Cells(norms.axes, (("adam", "w"), ("adam", "b")))
    series = Series(norms, one)
    series.append(0, Reading(norms, one, np.float32([1, 2]), np.ones(2, bool)))
    assert series.grid("parameter").tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match=r"leaves out 'parameter'.*'w', 'b'"):
        series.grid("optimizer")
    with pytest.raises(ValueError, match=r"'optimizer', 'parameter'.*got 'layer'"):
        series.grid("layer")


def test_a_signal_without_axes_has_a_grid_of_one_dimension():
    series = Series(Signal("reward/kl", (), "kl"), Cells.single())
    for step in range(3):
        series.append(step, Reading.scalar(series.signal, step))
    assert series.grid().tolist() == [0, 1, 2]


def test_unknown_names_come_with_near_ones():
    history = History()
    history.append(Frame(0, "slow", {HEADS.name: reading(HEADS, {("a", 0): 1.0})}, RunInfo()))
    assert "attention/max_logit" in history
    assert list(history) == ["attention/max_logit"]
    with pytest.raises(KeyError, match="Did you mean 'attention/max_logit'"):
        history["attention/max_logits"]
