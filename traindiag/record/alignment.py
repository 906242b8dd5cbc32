"""Brings readings whose cells come and go into one growing order of cells."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traindiag.record.cells import Cells
from traindiag.record.frame import BoolArray, FloatArray


class Alignment:
    """A fixed order of cells that only ever grows at its end.

    Ranks, idle experts and late optimizers make the cells of one signal differ from sample to sample. Where a cell
    has its place once, it keeps it, so rows of different samples stand under each other.

    Example:
        >>> order = Alignment(Cells.along("layer", ["a", "b"]))
        >>> order.places(Cells.along("layer", ["c", "a"])).tolist()
        [2, 0]
        >>> order.cells.labels
        ('a', 'b', 'c')
    """

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self._places: dict[str, NDArray[np.int64]] = {cells.digest: np.arange(len(cells))}

    def places(self, cells: Cells) -> NDArray[np.int64]:
        """Where ``cells`` stand in :attr:`cells`, which grows by those that are new.

        Args:
            cells: The cells of one reading, ``m`` of them.

        Returns:
            Indices ``[m]``. Known cells cost one look-up, not one a cell.
        """
        known = self._places.get(cells.digest)
        if known is None:
            self.cells = self.cells.union(cells)
            position = self.cells.position
            known = np.fromiter((position[c] for c in cells.coordinates), np.int64, len(cells))
            if len(self._places) >= 64:  # cells that change at every sample must not pile up here
                self._places.clear()
            self._places[cells.digest] = known
        return known

    def spread(self, cells: Cells, values: FloatArray, seen: BoolArray) -> tuple[FloatArray, BoolArray]:
        """Brings rows into the order of :attr:`cells`.

        Args:
            cells: ``m`` cells.
            values: float32 ``[k, m]``.
            seen: bool ``[k, m]``.

        Returns:
            The same ``[k, n]``; NaN and False for cells that the rows lack.
        """
        places = self.places(cells)
        if cells is self.cells or cells.digest == self.cells.digest:  # the usual case: nothing grew or moved
            return values, seen
        shape = (len(values), len(self.cells))
        wide_values, wide_seen = np.full(shape, np.nan, np.float32), np.zeros(shape, np.bool_)
        wide_values[:, places], wide_seen[:, places] = values, seen
        return wide_values, wide_seen
