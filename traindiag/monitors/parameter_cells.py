"""Cells, states and readings of signals that are measured per parameter of each optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells, Coordinates
from traindiag.record.frame import Reading


@lru_cache(maxsize=64)
def joined_cells(parts: tuple[Cells, ...]) -> Cells:
    """The cells of several optimizers in one; the same object for the same parts, which keeps messages compact.

    Example:
        >>> a, b = Cells(("optimizer",), (("Adam",),)), Cells(("optimizer",), (("SGD",),))
        >>> joined_cells((a, b)).labels
        ('Adam', 'SGD')
    """
    if len(parts) == 1:
        return parts[0]
    together: tuple[Coordinates, ...] = sum((p.coordinates for p in parts), ())
    return Cells(parts[0].axes, together)


def joined_states(parts: Iterable[Tensor]) -> Tensor:
    """States ``[..., n]`` of several optimizers, end to end on one device."""
    several = list(parts)
    if len(several) == 1:
        return several[0]
    return torch.cat([p.to(several[0].device, non_blocking=True) for p in several], dim=-1)


def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numerator by denominator; NaN where the denominator is not above 0, which is then not to be seen."""
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def reading(name: str, cells: Cells, values: NDArray[Any], seen: NDArray[np.bool_]) -> Reading:
    """A reading of a built-in signal, NaN where not seen."""
    return Reading.masked(BY_NAME[name], cells, values, seen)


def kept(readings: Sequence[Reading]) -> list[Reading]:
    """Those in which anything is seen."""
    return [r for r in readings if r.seen.any()]
