"""What travels: device tensors per cell, each with the reduction that joins micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from traindiag.record.cells import Cells

Key = tuple[str, str]
"""Name of a monitor and of one of its groups."""


@dataclass(frozen=True, slots=True)
class Group:
    """States of one monitor that share their cells.

    A statistic is sent as states and computed from the *reduced* states on the host: a root mean square is
    ``sqrt(sum / count)`` of summed states, never a mean of root mean squares.

    Args:
        name: Unique within its monitor.
        cells: ``n`` cells.
        sums: Tensors ``[n]``, added over ranks; identity 0.
        maxima: Tensors ``[n]``, the largest over ranks wins, NaN before anything; identity: unseen.

    Raises:
        ValueError: If a state is not ``[n]``.
    """

    name: str
    cells: Cells
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (len(self.cells),)
        for name, state in (*self.sums.items(), *self.maxima.items()):
            if state.shape != expected:  # a message of another length than the other ranks' would end the process
                raise ValueError(
                    f"group {self.name!r}: a state has one number a cell, {expected}; {name!r} has the shape "
                    f"{tuple(state.shape)}"
                )


@dataclass(frozen=True, slots=True)
class Reduced:
    """A group after the reduction, on the host.

    Args:
        cells: ``n`` cells, the union over ranks.
        seen: bool ``[n]``, measured by at least one rank.
        sums: float64 ``[n]`` each.
        maxima: float32 ``[n]`` each; NaN where not seen.
        ranks: int64 ``[n]`` for each maximum: the rank it came from, -1 where not seen.
    """

    cells: Cells
    seen: NDArray[np.bool_]
    sums: Mapping[str, NDArray[np.float64]]
    maxima: Mapping[str, NDArray[np.float32]]
    ranks: Mapping[str, NDArray[np.int64]]
