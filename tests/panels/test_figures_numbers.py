"""Numbers on their way into a figure: short, strict, and none of the extremes lost."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traindiag.panels.figures.chart import log_ticks
from traindiag.panels.figures.content import PanelContent
from traindiag.panels.figures.numbers import Columns, envelope, listed, stretches

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(floats, max_size=40))
def test_a_listed_number_is_the_float32_that_was_measured(values: list[float]) -> None:
    given = np.array(values, np.float32)
    written = json.loads(json.dumps(listed(given), allow_nan=False))
    for value, shown in zip(given, written):
        if math.isfinite(value):
            assert shown == pytest.approx(float(value), rel=1e-6, abs=1e-45)
        else:
            assert shown is None


@given(st.lists(floats, min_size=1, max_size=400), st.integers(1, 20))
def test_few_points_keep_the_extremes_of_every_stretch(values: list[float], bins: int) -> None:
    given = np.array(values, np.float64)
    kept = envelope(given, bins)
    assert len(kept) <= max(2 * bins + 2, 1) or len(given) <= 2 * bins
    assert kept[0] == 0 and kept[-1] == len(given) - 1
    assert (np.diff(kept) > 0).all() or len(kept) == 1
    finite = given[np.isfinite(given)]
    if finite.size:
        shown = given[kept]
        assert np.nanmax(np.where(np.isfinite(shown), shown, np.nan)) == finite.max()
        assert np.nanmin(np.where(np.isfinite(shown), shown, np.nan)) == finite.min()


def test_one_odd_value_among_a_million_is_drawn() -> None:
    values = np.zeros(1_000_000)
    values[777_777] = -3.0
    kept = envelope(values, 500)
    assert 777_777 in kept and len(kept) <= 1002


@given(st.lists(st.booleans(), max_size=60))
def test_stretches_are_the_flags(flags: list[bool]) -> None:
    rebuilt = [False] * len(flags)
    for first, last in stretches(np.array(flags, np.bool_)):
        assert first <= last and (first == 0 or not flags[first - 1])
        for i in range(first, last + 1):
            rebuilt[i] = True
    assert rebuilt == flags


@pytest.mark.parametrize("end", ["max", "min"])
@pytest.mark.parametrize("most", [1, 7, 50, 200])
def test_a_column_is_the_worst_of_its_samples(end: str, most: int) -> None:
    rng = np.random.default_rng(3)
    steps = np.sort(rng.choice(1000, 60, replace=False))
    values = rng.normal(size=(60, 4))
    values[rng.random((60, 4)) < 0.1] = np.nan
    values[5, 0], values[40, 1] = np.inf, -np.inf
    seen = rng.random((60, 4)) < 0.7
    columns = Columns(steps, most)
    best, bad = columns.worst(values, seen, end)
    assert len(best) == min(60, most) and columns.whole == (most >= 60)
    for k, (first, last) in enumerate(zip(columns.first, columns.last)):
        rows = (steps >= first) & (steps <= last)
        for cell in range(4):
            there = [v for v, s in zip(values[rows, cell], seen[rows, cell]) if s]
            finite = [v for v in there if math.isfinite(v)]
            wanted = (max if end == "max" else min)(finite) if finite else math.nan
            np.testing.assert_equal(best[k, cell], wanted)
            assert (bad[k, cell] != 0) == any(not math.isfinite(v) for v in there)
    assert sum(((steps >= a) & (steps <= b)).sum() for a, b in zip(columns.first, columns.last)) == 60


def test_no_samples_make_no_columns() -> None:
    columns = Columns(np.empty(0, np.int64), 10)
    best, bad = columns.worst(np.empty((0, 3)), np.empty((0, 3), np.bool_), "max")
    assert best.shape == bad.shape == (0, 3)


@given(st.floats(-12, 12), st.floats(0.2, 20))
def test_ticks_of_a_logarithm_lie_inside_and_are_few(low: float, span: float) -> None:
    ticks = log_ticks(low, low + span)
    exponents = np.log10(ticks["tickvals"])
    assert len(exponents) == len(ticks["ticktext"]) <= 7
    assert ((exponents >= low - 1e-6) & (exponents <= low + span + 1e-6)).all()
    assert (np.diff(exponents) > 0).all()


def test_json_is_strict_and_says_what_a_number_was() -> None:
    content = PanelContent("a", "A", ({"kind": "table", "rows": [{"v": math.nan, "w": -math.inf, "x": 1.5}]},))

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    rows = json.loads(content.to_json(), parse_constant=refuse)["blocks"][0]["rows"]
    assert rows == [{"v": "nan", "w": "-inf", "x": 1.5}]
