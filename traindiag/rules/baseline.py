"""What a baseline has to know of its run: warm-up, jumps of the learning rate, steps that were taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traindiag.record.cells import Cells
from traindiag.record.frame import BoolArray, Frame
from traindiag.rules.cell_table import CellTable, Fill

LR_JUMP = 1.5
"""Ratio of the learning rates of two frames in a row, up or down, beyond which they are two regimes. Step schedules
divide by 2 or more; a cosine or a line passes it in its last few steps only, when little is left to judge."""


class Turn(NamedTuple):
    """What a frame means for what was learned before it.

    Args:
        warming: The learning rate is still on its way to its peak: nothing seen here is typical.
        jumped: Optimizers whose learning rate has jumped since the frame before.
        back_to: First step that is run again, where steps were taken back; values from there on never happened.
    """

    warming: bool
    jumped: tuple[str, ...]
    back_to: int | None


class Course:
    """Follows a run from frame to frame.

    Warm-up is as long as the run's facts say. Where they do not, it lasts as long as the learning rate has risen from
    each frame to the next since the first. A resumed job is no turn by itself; one that begins at a step which was
    seen before takes back what was seen from there on.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> course, run = Course(), RunInfo(warmup=2)
        >>> def at(step, rate, segment=0):
        ...     return course.follow(Frame(step, "fast", {}, run, learning_rates={"adam": rate}, segment=segment))
        >>> [at(step, rate).warming for step, rate in enumerate([0.1, 0.2, 0.3, 0.3])]
        [True, True, False, False]
        >>> at(4, 0.03).jumped, at(5, 0.03, segment=1).back_to, at(3, 0.03, segment=2).back_to
        (('adam',), None, 3)
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._segment, self._step = 0, -1
        self._rising = True

    def follow(self, frame: Frame) -> Turn:
        """Takes the next frame."""
        back_to = frame.step if frame.segment != self._segment and frame.step <= self._step else None
        self._segment, self._step = frame.segment, frame.step
        before, rates = self._rates, {**self._rates, **frame.learning_rates}
        known = [name for name in frame.learning_rates if name in before]
        if known:
            changes = [rates[name] - before[name] for name in known]
            self._rising = self._rising and min(changes) >= 0 and max(changes) > 0
        stated = frame.run.warmup
        warming = self._rising and bool(known) if stated is None else frame.step < stated
        self._rates = rates
        jumped = () if warming else tuple(name for name in known if _jumps(before[name], rates[name]))
        return Turn(warming, jumped, back_to)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self._rates), "segment": self._segment, "step": self._step, "rising": self._rising}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """An empty state begins anew."""
        self._rates = {name: float(rate) for name, rate in state.get("rates", {}).items()}
        self._segment, self._step = int(state.get("segment", 0)), int(state.get("step", -1))
        self._rising = bool(state.get("rising", True))


def _jumps(before: float, now: float) -> bool:
    low, high = sorted((abs(before), abs(now)))
    return high > LR_JUMP * low


def trained_by(cells: Cells, optimizers: tuple[str, ...]) -> BoolArray:
    """Bool ``[n]``: cells that one of these optimizers trains; all of them where cells do not say.

    Example:
        >>> trained_by(Cells(("optimizer", "parameter"), (("a", "w"), ("b", "w"))), ("b",)).tolist()
        [False, True]
        >>> trained_by(Cells.along("layer", ["0", "1"]), ("b",)).tolist()
        [True, True]
    """
    if not optimizers or "optimizer" not in cells.axes:
        return np.full(len(cells), bool(optimizers))
    axis = cells.axes.index("optimizer")
    return np.array([c[axis] in optimizers for c in cells.coordinates], np.bool_)


class Past(CellTable):
    """The last values of every cell, each with its step, so that what never happened can be taken out again.

    ``values`` and ``steps`` are rings ``[rows, n]``: a cell's next value stands at ``count % rows``. The rows of
    cells are independent, so a sample that does not see a cell pushes nothing out of it.

    Args:
        where: Glob of the cells to judge.
        rows: Values kept of each cell.
        columns: Further columns, as in :class:`~traindiag.rules.cell_table.CellTable`.
    """

    def __init__(self, where: str, rows: int, **columns: Fill | tuple[int, Fill]) -> None:
        self.rows = rows
        super().__init__(where, values=(rows, np.nan), steps=(rows, -1), count=0, **columns)

    def push(self, values: NDArray[np.float64], cells: NDArray[np.intp], step: int) -> None:
        """Appends ``values[cells]`` to those cells."""
        at = self["count"][cells] % self.rows
        self["values"][at, cells], self["steps"][at, cells] = values[cells], step
        self["count"][cells] += 1

    def last(self, rows: int, cells: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.float64]:
        """The last values, oldest first, ``[rows, cells]``; NaN where there are not so many."""
        count = self["count"][cells]
        every = np.arange(len(self["count"]))[cells]
        found: NDArray[np.float64] = self["values"][(count + np.arange(-rows, 0)[:, None]) % self.rows, every]
        return found

    def keep(self, kept: BoolArray) -> None:
        """Takes out all values that ``kept`` ``[rows, n]`` does not mark; the rest stay in their order."""
        order = (self["count"] + np.arange(self.rows)[:, None]) % self.rows
        values, steps = (np.take_along_axis(self[c], order, 0) for c in ("values", "steps"))
        kept = np.take_along_axis(kept, order, 0) & ~np.isnan(values)
        order = np.argsort(~kept, axis=0, kind="stable")
        count = kept.sum(0)
        there = np.arange(self.rows)[:, None] < count
        self["values"] = np.where(there, np.take_along_axis(values, order, 0), np.nan)
        self["steps"] = np.where(there, np.take_along_axis(steps, order, 0), -1)
        self["count"] = count

    def take_back(self, step: int) -> BoolArray:
        """Takes out what was seen at ``step`` and later; bool ``[n]``: the cells that had such values."""
        later = self["steps"] >= step
        had: BoolArray = np.any(later, axis=0)
        if had.any():
            self.keep(~later)
        return had

    def forget(self, cells: BoolArray) -> None:
        """Takes out all values of some cells, bool ``[n]``."""
        if cells.any():
            self.keep(np.broadcast_to(~cells, self["values"].shape))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        there = ~np.isnan(self["values"])
        if (there.sum(0) != np.minimum(self["count"], self.rows)).any():  # a ring of other settings began anew
            self.keep(there)
