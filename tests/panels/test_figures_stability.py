"""The stability gap: shifts, depth and recovery stand where the numbers say."""

from __future__ import annotations

import numpy as np
import pytest

from tests.panels.logs import history, log
from tests.panels.test_figures_panels import block, trace
from traindiag.panels.figures.stability import gaps_of, shifts
from traindiag.panels.figures.view import View
from traindiag.record.cells import Cells
from traindiag.record.log import LogData

TASKS = Cells.along("task", ["old", "older"])
STEPS = range(0, 300, 10)


def gapped() -> tuple[LogData, np.ndarray]:
    """Task ``old`` falls from 0.9 to 0.4 at the shift at step 100 and is back 100 steps later; ``older`` stays."""
    steps = np.arange(0, 300, 10)
    since = np.maximum(0, steps - 100)
    old = np.where(steps < 100, 0.9, 0.9 - 0.5 * np.maximum(0.0, 1 - since / 100))
    values = np.stack([old, np.full(30, 0.7)], axis=1)
    depth = np.maximum.accumulate(0.9 - old)
    table = {
        "stability/value": (STEPS, TASKS, values),
        "stability/shift": ([100], Cells.along("reason", ["marked", "other"]), np.array([[1.0, 0.0]])),
        "stability/baseline": (STEPS[10:], TASKS, np.tile([0.9, 0.7], (20, 1))),
        "stability/gap_depth": (STEPS[10:], TASKS, np.stack([depth[10:], np.zeros(20)], axis=1)),
        "stability/recovered": (
            STEPS[10:],
            TASKS,
            np.stack([1 - (0.9 - old[10:]) / depth[10:], np.ones(20)], axis=1),
        ),
    }
    return log(history(table)), values


def test_a_gap_has_its_depth_and_the_step_at_which_it_was_back() -> None:
    logs, _ = gapped()
    view = View("run", logs)
    assert shifts(view) == [(100, "marked")]
    series = view.series("stability/value")
    assert series is not None
    (gap,) = gaps_of(view, series)
    assert (gap.task, gap.shift, gap.step, gap.closed) == (0, 100, 100, 200)
    assert gap.level == pytest.approx(0.9) and gap.value == pytest.approx(0.4) and gap.depth == pytest.approx(0.5)


def test_the_curve_is_marked_with_them() -> None:
    logs, values = gapped()
    made = block(logs, "stability", "old-tasks-value")
    np.testing.assert_allclose(trace(made, "old")["y"], values[:, 0], rtol=1e-6)
    mark = next(t for t in made["figure"]["data"] if t.get("mode") == "markers+text")
    assert mark["x"] == [100, 200] and mark["text"] == ["-0.5", ""]
    assert "back at step 200" in mark["hovertext"]
    assert "marked" in {a["text"] for a in made["figure"]["layout"]["annotations"]}


def test_a_gap_that_stays_open_says_so() -> None:
    logs, _ = gapped()
    cut = LogData(**{**vars(logs)})
    cut.history.rollback(150)
    view = View("run", cut)
    series = view.series("stability/value")
    assert series is not None
    assert [g.closed for g in gaps_of(view, series)] == [None]
    marks = [
        t for t in block(cut, "stability", "old-tasks-value")["figure"]["data"] if t.get("mode") == "markers+text"
    ]
    assert "not back" in marks[0]["hovertext"] and marks[0]["x"] == [100]


def test_a_loss_falls_upwards() -> None:
    _, values = gapped()
    made = history(
        {
            "stability/loss": (STEPS, TASKS, 1.5 - values),
            "stability/shift": ([100], Cells.along("reason", ["marked"]), np.ones((1, 1))),
            "stability/baseline": (STEPS[10:], TASKS, np.tile([0.6, 0.8], (20, 1))),
            "stability/gap_depth": (STEPS[10:], TASKS, np.tile([0.5, 0.0], (20, 1))),
        }
    )
    view = View("run", log(made))
    series = view.series("stability/loss")
    assert series is not None
    (gap,) = gaps_of(view, series)
    assert (gap.step, round(gap.value, 6), round(gap.level, 6)) == (100, 1.1, 0.6)


def test_values_beyond_any_return_have_a_line() -> None:
    cells = Cells.along("module", ["critic"])
    made = history({"plasticity/q_bound_ratio": (range(5), cells, np.linspace(0.5, 2, 5)[:, None])})
    drawn = block(log(made), "plasticity", "q-bound")
    assert [s["y0"] for s in drawn["figure"]["layout"]["shapes"] if s["y0"] == s["y1"]] == [1.0, 2.0]
    np.testing.assert_allclose(trace(drawn, "critic")["y"], np.linspace(0.5, 2, 5), rtol=1e-6)


def test_the_curve_begins_shortly_before_the_first_shift() -> None:
    logs, values = gapped()
    made = block(logs, "stability", "old-tasks-value")
    laid = made["figure"]["layout"]
    assert laid["xaxis"]["range"][0] == 100 - 190 // 3 and laid["xaxis"]["range"][1] >= 290
    assert laid["yaxis"]["range"][0] < values[10:].min() and laid["yaxis"]["range"][1] > values[10:].max()
    assert trace(made, "old")["x"][0] == 0, "the whole run is there to zoom out to"
