"""Plain numbers as frames: what a live run would have measured, at the step at which it would have had it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traindiag.alerts.alert import Alert
from traindiag.playback.judged import judge
from traindiag.record.catalogue import BY_NAME, check_signal
from traindiag.record.cells import Cells, Coordinates
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane, Signal
from traindiag.rules.rule import Rule

LEARNING_RATE = "learning_rate"
"""No signal, but what a frame tells beside its readings."""


def replay_series(
    series: Mapping[str, Any],
    rules: Sequence[Rule] | None = None,
    run: RunInfo | None = None,
    every: int = 1,
) -> list[Alert]:
    """Judges series of numbers from anywhere, as if a run had measured them.

    NaN is a result like any other, and told. What was not measured is left out or None; of a data frame with gaps
    pass ``column.dropna()``.

    Args:
        series: By signal name, or ``learning_rate``: a sequence, an array ``[n]`` or ``[n, cells]`` (one dimension
            an axis of the signal), a mapping from step to value, or a pandas Series or the DataFrame itself. An index
            of whole numbers that does not simply count from 0 is taken for steps.
        rules: In place of the default pack.
        run: What is known of the run; remedies name its values, and forecasts end with its length.
        every: Steps from one value to the next, where there are no steps with them.

    Returns:
        Every alert, oldest first.

    Raises:
        ValueError: If there is no such built-in signal, the shape fits no signal, or steps do not grow.

    Example:
        >>> norms = [0.24, 0.25, 0.23, 0.24, 0.25, 0.24, 1.1, 2.4]
        >>> [(a.step, a.title) for a in replay_series({"gradient/norm": norms}, every=10)]
        [(60, 'Gradient norm jumped')]
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of steps, at least 1, got {every!r}")
    known = run or RunInfo()
    columns = [Column.of(str(name), values, every) for name, values in series.items()]
    return judge(frames_of(columns, known), rules, known.run_id).alerts


class Column:
    """The values of one signal with their steps.

    Args:
        signal: What they are; None for a learning rate.
        steps: ``[n]``, growing.
        cells: ``m`` cells.
        values: float32 ``[n, m]``.
        seen: bool ``[n, m]``.
    """

    def __init__(
        self,
        signal: Signal | None,
        steps: NDArray[np.int64],
        cells: Cells,
        values: NDArray[np.float32],
        seen: NDArray[np.bool_],
    ) -> None:
        self.signal, self.steps, self.cells, self.values, self.seen = signal, steps, cells, values, seen

    @classmethod
    def of(cls, name: str, values: Any, every: int = 1) -> Column:
        """Takes what :func:`replay_series` takes."""
        if name != LEARNING_RATE:
            check_signal(name)
        steps, table, seen = _table(name, values, every)
        if (np.diff(steps) <= 0).any():
            at = int(steps[int(np.argmax(np.diff(steps) <= 0)) + 1])
            raise ValueError(f"{name}: steps must grow, got {at} after one that is not smaller")
        signal, cells = _described(name, table.shape[1:])
        flat = (len(table), -1) if table.size else (0, len(cells))
        with np.errstate(over="ignore"):  # larger than float32 holds: infinite, as in a live run
            numbers = table.reshape(flat).astype(np.float32)
        return cls(None if name == LEARNING_RATE else signal, steps, cells, numbers, seen.reshape(flat))


def frames_of(columns: Iterable[Column], run: RunInfo) -> Iterator[Frame]:
    """Frames in the order of a live run: step by step, and of a step the fast lane first."""
    lanes: tuple[Lane, ...] = ("fast", "slow", "active")
    places: dict[tuple[int, int], list[tuple[Column, int]]] = {}
    rates: dict[int, float] = {}
    for column in columns:
        lane = 0 if column.signal is None else lanes.index(column.signal.lane)
        for k, step in enumerate(column.steps.tolist()):
            if column.signal is not None:
                places.setdefault((step, lane), []).append((column, k))
            elif column.seen[k].all():
                rates[step] = float(column.values[k, 0])
    optimizer = run.optimizers[0].name if run.optimizers else "optimizer"
    known = sorted(rates.items())
    rate: dict[str, float] = {}
    for (step, lane), found in sorted(places.items(), key=lambda item: item[0]):
        while known and known[0][0] <= step:
            rate = {optimizer: known.pop(0)[1]}
        readings = {
            c.signal.name: Reading.masked(c.signal, c.cells, c.values[k], c.seen[k]) for c, k in found if c.signal
        }
        yield Frame(step, lanes[lane], readings, run, learning_rates=rate)


def _table(name: str, values: Any, every: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Steps ``[n]``, values ``[n, ...]`` and which of them were measured."""
    steps: list[Any] | None = None
    if isinstance(values, Mapping):
        steps, values = list(values), list(values.values())
    elif hasattr(values, "index") and hasattr(values, "to_numpy"):  # a column of pandas
        index = np.asarray(values.index)
        values = values.to_numpy()
        if index.dtype.kind in "iu" and not np.array_equal(index, np.arange(len(index))):
            steps = index.tolist()
    try:
        rows = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
        seen = np.array(rows != np.array(None), np.bool_) if rows.dtype == object else np.ones(rows.shape, np.bool_)
        table = np.where(seen, rows, np.nan).astype(np.float64)
        at = np.arange(len(table)) * every if steps is None else np.array([int(s) for s in steps], np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, one a step or a row of cells a step: {error}") from error
    if table.ndim < 1:
        raise ValueError(f"{name}: expected numbers, one a step or a row of cells a step, got {values!r}")
    if (at < 0).any():
        raise ValueError(f"{name}: steps count from 0, got {int(at.min())}")
    return at.astype(np.int64), table, seen


def _described(name: str, shape: tuple[int, ...]) -> tuple[Signal, Cells]:
    """The signal and its cells; axes that the values lack are left out, the outer ones first."""
    known = BY_NAME.get(name)
    if known is None:
        signal = Signal(
            name, tuple("cell" if i == 0 else f"axis{i}" for i in range(len(shape))), "a series", lane="fast"
        )
    elif not shape and known.axes[-1:] == ("parameter",):  # rules on parameters look for one
        signal, shape = replace(known, axes=("parameter",)), (1,)
    elif len(shape) > len(known.axes):
        raise ValueError(f"{name} has the axes {known.axes}, got {len(shape)} dimensions beside the steps")
    else:
        signal = replace(known, axes=known.axes[len(known.axes) - len(shape) :])
    if not shape:
        return signal, Cells.single()
    coordinates: tuple[Coordinates, ...] = tuple(itertools.product(*map(range, shape)))
    return signal, Cells(signal.axes, coordinates)
