"""Where a number was measured: one :class:`Cell`, or the :class:`Cells` of a whole reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

Coordinate = str | int
Coordinates = tuple[Coordinate, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of measurement, such as one head of one layer.

    Example:
        >>> str(Cell(("layer", "head"), ("blocks.0.attn", 3)))
        'blocks.0.attn head 3'
    """

    axes: tuple[str, ...]
    coordinates: Coordinates

    def __str__(self) -> str:
        return cell_label(self.axes, self.coordinates)


def cell_label(axes: Sequence[str], coordinates: Coordinates) -> str:
    """Names speak for themselves; a bare number is told with its axis."""
    words = (f"{axis} {at}" if isinstance(at, int) else at for axis, at in zip(axes, coordinates))
    return " ".join(words)


@dataclass(frozen=True)
class Cells:
    """The cells of a reading, in a fixed order shared by its value arrays.

    Example:
        >>> cells = Cells(("layer", "head"), (("blocks.0", 0), ("blocks.0", 1)))
        >>> len(cells), cells.label(1)
        (2, 'blocks.0 head 1')
    """

    axes: tuple[str, ...]
    coordinates: tuple[Coordinates, ...]

    def __post_init__(self) -> None:
        wrong = next((c for c in self.coordinates if len(c) != len(self.axes)), None)
        if wrong is not None:
            raise ValueError(f"a cell of axes {self.axes} needs {len(self.axes)} coordinates, got {wrong!r}")

    @classmethod
    def single(cls) -> Cells:
        """The one cell of a signal without axes."""
        return _SINGLE

    @classmethod
    def along(cls, axis: str, names: Iterable[Coordinate]) -> Cells:
        """Cells of one axis."""
        return cls((axis,), tuple((name,) for name in names))

    def __len__(self) -> int:
        return len(self.coordinates)

    def __iter__(self) -> Iterator[Cell]:
        return (Cell(self.axes, c) for c in self.coordinates)

    def __getitem__(self, index: int) -> Cell:
        return Cell(self.axes, self.coordinates[index])

    def label(self, index: int) -> str:
        return cell_label(self.axes, self.coordinates[index])

    @cached_property
    def position(self) -> dict[Coordinates, int]:
        """Coordinates to index."""
        return {c: i for i, c in enumerate(self.coordinates)}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.label(i) for i in range(len(self)))

    @cached_property
    def digest(self) -> str:
        """A short hash of axes and coordinates, equal on every rank and in every process."""
        return hashlib.sha256(json.dumps([self.axes, self.coordinates]).encode()).hexdigest()[:16]

    def union(self, other: Cells) -> Cells:
        """These cells followed by those of ``other`` that are new."""
        if self.axes != other.axes:
            raise ValueError(f"cells of axes {self.axes} and {other.axes} have no union")
        new = tuple(c for c in other.coordinates if c not in self.position)
        return self if not new else Cells(self.axes, self.coordinates + new)


_SINGLE = Cells((), ((),))
"""One object for all scalar readings: the same cells need no comparison."""
