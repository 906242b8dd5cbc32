"""What a rule remembers of every cell, as columns that outlive a change of the cells."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traindiag.record.cells import Cells
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.rules.rule import Rule, Severity, Verdict

Fill = bool | int | float


def matches(pattern: str, cells: Cells, index: int) -> bool:
    """Whether a glob fits a cell's label or any one of its coordinates (case counts; ``[`` opens a set).

    Example:
        >>> cells = Cells(("layer", "head"), (("blocks.0.attn", 3),))
        >>> [matches(p, cells, 0) for p in ("blocks.0.*", "blocks.0.attn head 3", "3", "blocks.1.*")]
        [True, True, True, False]
    """
    words = (cells.label(index), *map(str, cells.coordinates[index]))
    return any(fnmatchcase(word, pattern) for word in words)


class CellTable:
    """Named columns over every cell met so far, addressed by coordinates.

    A rule works on whole columns. Cells may be added, leave or change places between readings: :meth:`align` brings a
    reading into the table's order, at no cost while the reading carries the same ``cells`` object.

    Args:
        where: Glob of the cells to judge, as in :func:`matches`.
        columns: What a new cell holds, for a column ``[n]`` of that value's type, or ``(rows, value)`` for a window
            ``[rows, n]``.
    """

    def __init__(self, where: str = "*", **columns: Fill | tuple[int, Fill]) -> None:
        self.where = where
        self._fill: dict[str, tuple[tuple[int, ...], Fill]] = {
            name: ((fill[0],), fill[1]) if isinstance(fill, tuple) else ((), fill) for name, fill in columns.items()
        }
        self._forget()

    def _forget(self) -> None:
        self.cells: Cells | None = None
        self._columns = {name: np.full((*rows, 0), fill) for name, (rows, fill) in self._fill.items()}
        self._chosen: BoolArray = np.zeros(0, np.bool_)
        self._given: Cells | None = None
        self._rows: NDArray[np.intp] | None = None

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self._columns[column]

    def __setitem__(self, column: str, values: NDArray[Any]) -> None:
        self._columns[column] = values

    def align(self, reading: Reading) -> tuple[FloatArray, BoolArray]:
        """Values and what is to be judged, both ``[n]`` in the table's order; NaN where not seen.

        Raises:
            ValueError: If the signal's axes have changed.
        """
        if reading.cells is not self._given:
            self._meet(reading.cells)
        if self._rows is None:
            return reading.values, reading.seen if self.where == "*" else reading.seen & self._chosen
        n = len(self._chosen)
        values, seen = np.full(n, np.nan, np.float32), np.zeros(n, np.bool_)
        values[self._rows], seen[self._rows] = reading.values, reading.seen
        return values, seen & self._chosen

    def rank(self, reading: Reading, index: int) -> int | None:
        """The rank that the value of a cell of this table came from, where it is known."""
        if reading.ranks is None or self.cells is None:
            return None
        at = reading.cells.position.get(self.cells.coordinates[index])
        rank = -1 if at is None else int(reading.ranks[at])
        return rank if rank >= 0 else None

    def _meet(self, cells: Cells) -> None:
        known = self.cells
        if known is None:
            self._grow(cells)
        elif known.axes != cells.axes or known.coordinates != cells.coordinates:
            self._grow(known.union(cells))
        assert self.cells is not None
        same = self.cells.coordinates == cells.coordinates
        self._rows = None if same else np.array([self.cells.position[c] for c in cells.coordinates], np.intp)
        self._given = cells

    def _grow(self, cells: Cells) -> None:
        old = len(self._chosen)
        for name, column in self._columns.items():
            rows, fill = self._fill[name]
            new = np.full((*rows, len(cells) - old), fill)
            self._columns[name] = np.concatenate([column, new], axis=-1)
        chosen = [self.where == "*" or matches(self.where, cells, i) for i in range(old, len(cells))]
        self._chosen = np.concatenate([self._chosen, np.array(chosen, np.bool_)])
        self.cells = cells

    def state_dict(self) -> dict[str, Any]:
        """Cells and columns as lists."""
        if self.cells is None:
            return {}
        return {
            "axes": list(self.cells.axes),
            "coordinates": [list(c) for c in self.cells.coordinates],
            "columns": {name: column.tolist() for name, column in self._columns.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces all that the table held; columns that the state lacks begin anew."""
        self._forget()
        if not state:
            return
        self._grow(Cells(tuple(state["axes"]), tuple(tuple(c) for c in state["coordinates"])))
        for name, values in state["columns"].items():
            # A window of another length belongs to other settings: it begins anew.
            if name in self._columns and np.shape(values) == self._columns[name].shape:
                self._columns[name] = np.array(values, self._columns[name].dtype)


def verdict_at(
    rule: Rule,
    kind: str,
    frame: Frame,
    table: CellTable,
    reading: Reading,
    at: int,
    *,
    severity: Severity,
    value: float,
    evidence: str,
    limit: float | None = None,
    others: int = 0,
    active: bool = True,
) -> Verdict:
    """What ``rule`` finds at cell ``at`` of its table, with the rank that the value came from."""
    assert table.cells is not None
    return Verdict(
        rule.name,
        kind,
        reading.signal.name,
        frame.step,
        active,
        severity,
        table.cells[at],
        value,
        limit,
        others,
        rank=table.rank(reading, at),
        evidence=evidence,
        cooldown=rule.cooldown,
    )
