"""Many healthy or broken series at once, as the cells of one signal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal
from traindiag.rules.rule import Rule, Verdict
from traindiag.rules.shift import Shift
from traindiag.rules.trend import Trend

POSITIVE = Signal("user/p", ("place",), "a positive number of the user's own", positive=True)

Series = NDArray[np.float64]


def noise(kind: str, steps: int = 2000, cells: int = 200, seed: int = 0, sigma: float = 0.35) -> Series:
    """Log-normal ``[steps, cells]`` around 1: ``independent``, or ``AR(0.9)`` in the logarithm."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(steps, cells))
    if kind == "AR(0.9)":
        drawn[1:] *= np.sqrt(1 - 0.9**2)
        for t in range(1, steps):
            drawn[t] += 0.9 * drawn[t - 1]
    values: Series = np.exp(sigma * drawn)
    return values


@dataclass
class Said:
    """What a rule said of such series.

    Args:
        onsets: ``[cells]``, how often each cell began to fail.
        first: ``[cells]``, step of the first time, -1 for never.
        verdicts: All of them.
    """

    onsets: NDArray[np.int64]
    first: NDArray[np.int64]
    verdicts: list[Verdict]


def judge(
    rule: Rule, series: Series, *, every: int = 1, run: RunInfo | None = None, signal: Signal = POSITIVE
) -> Said:
    """Feeds every ``every``-th row; cells that fail are read off the rule's own state."""
    steps, n = series.shape
    cells, seen = Cells.along("place", [str(i) for i in range(n)]), np.ones(n, np.bool_)
    onsets, first, was = np.zeros(n, np.int64), np.full(n, -1), np.zeros(n, np.bool_)
    said = Said(onsets, first, [])
    for step in range(0, steps, every):
        reading = Reading(signal, cells, series[step].astype(np.float32), seen)
        made = Frame(step, "fast", {signal.name: reading}, run or RunInfo())
        said.verdicts += rule.update(made)
        now = failing(rule)
        began = now & ~was
        onsets += began
        first[began & (first < 0)] = step
        was = now
    return said


def failing(rule: Rule) -> NDArray[np.bool_]:
    """Cells that fail now. A shift is told once, and its cell, of which nothing is left then, is learned anew."""
    table = rule._table  # type: ignore[attr-defined]
    if isinstance(rule, Shift):
        return np.array(table["count"] == 0)
    return np.array(table["side" if isinstance(rule, Trend) else "active"] != 0)
