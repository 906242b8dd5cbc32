"""What was measured so far: one :class:`Series` a signal, and the bounded :class:`History` of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traindiag.record.alignment import Alignment
from traindiag.record.catalogue import near
from traindiag.record.cells import Cell, Cells, Coordinate
from traindiag.record.frame import BoolArray, FloatArray, Frame, IntArray, Reading
from traindiag.record.signal import Signal

MAX_SAMPLES = 10_000
MAX_BYTES = 64 * 2**20
"""Shared by all series of a history: 64 MB hold 480 samples of a signal with 27,000 cells."""

_FEWEST = 4  # samples that a series keeps however large one of them is


class Extreme(NamedTuple):
    """The worst number of a series, and where and when it occurred."""

    value: float
    cell: Cell
    step: int


class Series:
    """All kept samples of one signal, oldest first.

    Arrays that were handed out never change afterwards, and are read-only.

    Args:
        signal: What is measured.
        cells: Cells known from the start; more may join with later readings.

    Example:
        >>> loss = Signal("loss/value", ("optimizer",), "loss")
        >>> cells = Cells.along("optimizer", ["adam"])
        >>> series = Series(loss, cells)
        >>> for step in range(3):
        ...     series.append(step, Reading(loss, cells, np.float32([step / 2]), np.array([True])))
        >>> series
        Series('loss/value', 3 samples x 1 cell, steps 0-2, worst 1 at adam, step 2)
        >>> series.grid("optimizer").tolist()
        [[0.0], [0.5], [1.0]]
    """

    def __init__(self, signal: Signal, cells: Cells) -> None:
        self.signal = signal
        self.thinned = False
        """Whether samples were left out for want of room."""
        self._order = Alignment(cells)
        self._count = 0
        self._steps = np.empty(0, np.int64)
        self._segments = np.empty(0, np.int64)
        self._values = np.empty((0, len(cells)), np.float32)
        self._seen = np.empty((0, len(cells)), np.bool_)

    @property
    def cells(self) -> Cells:
        """The ``c`` cells that the columns of :attr:`values` stand for."""
        return self._order.cells

    @property
    def steps(self) -> IntArray:
        """int64 ``[n]``, strictly increasing."""
        return _fixed(self._steps[: self._count])

    @property
    def segments(self) -> IntArray:
        """int64 ``[n]``: the job of the run that each sample comes from."""
        return _fixed(self._segments[: self._count])

    @property
    def values(self) -> FloatArray:
        """float32 ``[n, c]``; NaN where not seen, and where a NaN was measured: :attr:`seen` tells them apart."""
        return _fixed(self._values[: self._count])

    @property
    def seen(self) -> BoolArray:
        """Bool ``[n, c]``: whether the cell was measured in that sample."""
        return _fixed(self._seen[: self._count])

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        many = "" if len(self.cells) == 1 else "s"
        text = f"{self.signal.name!r}, {self._count} samples x {len(self.cells)} cell{many}"
        if self._count:
            text += f", steps {self._steps[0]}-{self._steps[self._count - 1]}"
        extreme = self.extreme()
        if extreme is not None:
            place = ", ".join(w for w in (str(extreme.cell), f"step {extreme.step}") if w)
            text += f", worst {extreme.value:.4g} at {place}"
        return f"Series({text})"

    def axis(self, name: str) -> tuple[Coordinate, ...]:
        """The coordinates along one axis, as :meth:`grid` orders them: numbers ascending, names as they appeared.

        Raises:
            ValueError: If the signal has no such axis.
        """
        if name not in self.cells.axes:
            raise ValueError(f"{self.signal.name} has the axes {self.cells.axes}, got {name!r}")
        at = self.cells.axes.index(name)
        found = dict.fromkeys(c[at] for c in self.cells.coordinates)
        numbers = [c for c in found if isinstance(c, int)]
        return tuple(sorted(numbers)) if len(numbers) == len(found) else tuple(found)

    def grid(self, *axes: str) -> np.ma.MaskedArray[Any, np.dtype[np.float32]]:
        """The values as a table over axes.

        Args:
            *axes: Every axis of the signal in the order wanted; one that has a single coordinate may be left out.

        Returns:
            Masked float32 ``[n, len(self.axis(axes[0])), ...]``; masked where nothing was measured, so that a NaN
            left in it is a result.

        Raises:
            ValueError: If an axis is unknown, or left out although it has several coordinates.
        """
        labels = [self.axis(a) for a in axes]
        for left in set(self.cells.axes) - set(axes):
            if len(self.axis(left)) > 1:
                raise ValueError(f"grid{axes} of {self.signal.name} leaves out {left!r}, which has {self.axis(left)}")
        columns = [self.cells.axes.index(a) for a in axes]
        places = [{c: i for i, c in enumerate(names)} for names in labels]
        index = tuple(
            np.array([place[c[column]] for c in self.cells.coordinates], np.int64)
            for place, column in zip(places, columns)
        )
        shape = (self._count, *map(len, labels))
        values = np.full(shape, np.nan, np.float32)
        seen = np.zeros(shape, np.bool_)
        # A signal without axes has one cell and no index: its column is the whole row.
        at: Any = (slice(None), *index)
        values[at] = self.values if index else self.values[:, 0]
        seen[at] = self.seen if index else self.seen[:, 0]
        return np.ma.MaskedArray(values, mask=~seen)

    def worst_cells(self) -> IntArray:
        """int64 ``[n]``: index of the worst cell of each sample, a non-finite one first; -1 where none was seen."""
        if not len(self.cells):
            return np.full(self._count, -1, np.int64)
        values, seen = self.values, self.seen
        bad = seen & ~np.isfinite(values)
        ends = np.float32(-np.inf if self.signal.worst == "max" else np.inf)
        finite = np.where(seen & ~bad, values, ends)
        pick = finite.argmax(axis=1) if self.signal.worst == "max" else finite.argmin(axis=1)
        cells = np.where(bad.any(axis=1), bad.argmax(axis=1), pick)
        return np.where(seen.any(axis=1), cells, -1)

    def worst(self) -> np.ma.MaskedArray[Any, np.dtype[np.float32]]:
        """Masked float32 ``[n]``: the value of the worst cell of each sample; masked where none was seen."""
        cells = self.worst_cells()
        found = self.values[np.arange(self._count), cells] if len(self.cells) else np.full(self._count, np.nan)
        return np.ma.MaskedArray(found.astype(np.float32), mask=cells < 0)

    def extreme(self) -> Extreme | None:
        """The worst number of all samples: the first non-finite one if there is any; None if nothing was seen."""
        cells, worst = self.worst_cells(), self.worst()
        rows = np.flatnonzero(cells >= 0)
        if not rows.size:
            return None
        values = worst.data[rows]
        bad = np.flatnonzero(~np.isfinite(values))
        pick = bad[0] if bad.size else (values.argmax() if self.signal.worst == "max" else values.argmin())
        row = int(rows[pick])
        return Extreme(float(worst.data[row]), self.cells[int(cells[row])], int(self._steps[row]))

    def append(self, step: int, reading: Reading, segment: int = 0) -> None:
        """Adds one sample; a step that was there before replaces it and all later ones.

        Raises:
            ValueError: If the reading has other axes than the series.
        """
        self.extend(np.array([step]), reading.cells, reading.values[None], reading.seen[None], segment)

    def extend(self, steps: IntArray, cells: Cells, values: FloatArray, seen: BoolArray, segment: int = 0) -> None:
        """Adds ``k`` samples at once.

        Args:
            steps: ``[k]``, strictly increasing; if the first was there before, it and all later ones are replaced.
            cells: ``m`` cells; new ones become new columns.
            values: float32 ``[k, m]``.
            seen: bool ``[k, m]``.
            segment: Job of the run.
        """
        if self._count and steps[0] <= self._steps[self._count - 1]:
            self.rollback(int(steps[0]) - 1)
        if self.needs_room(cells, len(steps)):
            self.reserve(self._count + max(_FEWEST, len(steps), self._count // 2))
        new = slice(self._count, self._count + len(steps))
        self._values[new], self._seen[new] = self._order.spread(cells, values, seen)
        self._steps[new] = steps
        self._segments[new] = segment
        self._count += len(steps)

    def rollback(self, step: int) -> None:
        """Forgets the samples after ``step``: a resumed run goes there once more."""
        kept = int(np.searchsorted(self.steps, step, side="right"))
        if kept < self._count:
            self._allocate(kept, np.arange(kept))

    def thin(self) -> None:
        """Drops a quarter of the samples: of every other one, those that stand closest together for their age.

        Dropping from the older half alone would, repeated, forget all but the first and the latest samples. With gaps
        in proportion to their age every past stays, the distant coarser than the recent.
        """
        steps = self.steps
        odd = np.arange(1, self._count - 1, 2)
        crowding = (steps[odd + 1] - steps[odd - 1]) / (steps[-1] - steps[odd])
        dropped = odd[np.argsort(crowding, kind="stable")[: max(1, self._count // 4)]]
        kept = np.delete(np.arange(self._count), dropped)
        self._allocate(len(kept), kept)
        self.thinned = True

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return len(self._steps) * (16 + 5 * self._values.shape[1])

    def needs_room(self, cells: Cells, more: int) -> bool:
        """Whether ``more`` samples of ``cells`` make the arrays grow; cells that are new take their place."""
        self._order.places(cells)
        return self._count + more > len(self._steps) or len(self.cells) > self._values.shape[1]

    def reserve(self, rows: int) -> None:
        """Makes room for ``rows`` samples in all."""
        self._allocate(rows, np.arange(self._count))

    def _allocate(self, rows: int, kept: NDArray[np.int64]) -> None:
        """Moves the samples ``kept`` into new arrays of ``rows`` rows; arrays handed out keep the old ones."""
        n, old = len(kept), self._values.shape[1]
        values = np.full((rows, len(self.cells)), np.nan, np.float32)
        seen = np.zeros((rows, len(self.cells)), np.bool_)
        steps, segments = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        values[:n, :old] = self._values[kept]
        seen[:n, :old] = self._seen[kept]
        steps[:n], segments[:n] = self._steps[kept], self._segments[kept]
        self._values, self._seen, self._steps, self._segments = values, seen, steps, segments
        self._count = n


class History(Mapping[str, Series]):
    """Every signal of a run, within a fixed amount of memory.

    What grows beyond its bounds is thinned and never cut off: the largest series keeps its whole past, the distant
    coarser than the recent.

    Args:
        max_samples: Samples that one series holds.
        max_bytes: Bytes that all series hold together. Each keeps at least four samples, whatever they weigh.

    Raises:
        ValueError: If a bound is too small.

    Example:
        >>> history = History(max_samples=8)
        >>> signal = Signal("reward/kl", (), "divergence from the reference")
        >>> for step in range(100):
        ...     history.add(step, Reading.scalar(signal, 0.1 * step))
        >>> history["reward/kl"].steps.tolist()
        [0, 76, 88, 94, 96, 97, 98, 99]
    """

    def __init__(self, max_samples: int = MAX_SAMPLES, max_bytes: int = MAX_BYTES) -> None:
        if max_samples < _FEWEST or max_bytes < 1:
            raise ValueError(f"expected max_samples >= {_FEWEST}, max_bytes >= 1, got {max_samples}, {max_bytes}")
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        self._series: dict[str, Series] = {}

    def __getitem__(self, name: str) -> Series:
        if name not in self._series:
            raise KeyError(f"nothing was recorded of {name!r}.{near(name, self._series)} There is {list(self)}")
        return self._series[name]

    def __contains__(self, name: object) -> bool:
        return name in self._series

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def __repr__(self) -> str:
        return f"History({len(self)} series, {self.nbytes / 2**20:.1f} of {self.max_bytes / 2**20:.0f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all series."""
        return sum(s.nbytes for s in self._series.values())

    def append(self, *frames: Frame) -> None:
        """Adds every reading of some frames, in order; several at once cost little more than one."""
        rows: dict[str, list[tuple[int, Reading, int]]] = {}
        for frame in frames:
            for name, reading in frame.readings.items():
                rows.setdefault(name, []).append((frame.step, reading, frame.segment))
        for same_signal in rows.values():
            for _, alike in groupby(same_signal, key=lambda row: (row[1].cells.digest, row[2])):
                self._add(list(alike))

    def _add(self, rows: Sequence[tuple[int, Reading, int]]) -> None:
        """Rows of one signal, with the same cells and of one segment."""
        steps, readings, segments = zip(*rows)
        if any(a >= b for a, b in pairwise(steps)):
            for step, reading, segment in rows:
                self.add(step, reading, segment)
            return
        values, seen = np.stack([r.values for r in readings]), np.stack([r.seen for r in readings])
        self.extend(readings[0].signal, np.array(steps), readings[0].cells, values, seen, segments[0])

    def add(self, step: int, reading: Reading, segment: int = 0) -> None:
        """Adds one reading; a step that was there before replaces it and all later ones."""
        rows = np.array([step]), reading.cells, reading.values[None], reading.seen[None]
        self.extend(reading.signal, *rows, segment)

    def extend(
        self, signal: Signal, steps: IntArray, cells: Cells, values: FloatArray, seen: BoolArray, segment: int = 0
    ) -> None:
        """Adds ``k`` samples of one signal at once; see :meth:`Series.extend`."""
        series = self._series.get(signal.name)
        if series is None:
            series = self._series[signal.name] = Series(signal, cells)
        batch = max(1, self.max_samples // 8)  # so that thinning finds older samples to drop
        for at in range(0, len(steps), batch):
            part = slice(at, at + batch)
            if series.needs_room(cells, len(steps[part])):
                self._make_room(series, len(steps[part]))
            series.extend(steps[part], cells, values[part], seen[part], segment)

    def rollback(self, step: int) -> None:
        """Forgets what was measured after ``step``."""
        for series in self._series.values():
            series.rollback(step)

    def _make_room(self, series: Series, more: int) -> None:
        """Lets ``series`` grow by half, or makes the largest of all thinner until there is room for ``more``."""
        while len(series) + more > self.max_samples:
            series.thin()
        row_bytes = 16 + 5 * len(series.cells)
        while True:
            count = len(series)
            wanted = min(count + max(_FEWEST, more, count // 2), self.max_samples)
            affordable = (self.max_bytes - self.nbytes + series.nbytes) // row_bytes
            # Growing by less than an eighth would copy the whole series again after a few samples.
            if affordable >= min(wanted, count + more + count // 8):
                return series.reserve(min(wanted, affordable))
            largest = max(self._series.values(), key=lambda s: len(s) > _FEWEST and s.nbytes)
            if len(largest) <= _FEWEST:
                return series.reserve(count + more)
            largest.thin()


def _fixed(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
