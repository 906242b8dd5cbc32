"""Frames made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane, Signal
from traindiag.rules.rule import Rule, Verdict

X = Signal("user/x", ("place",), "a number of the user's own")


def reading(
    values: Sequence[float], signal: Signal | str = X, cells: Cells | None = None, seen: Sequence[bool] | None = None
) -> Reading:
    signal = BY_NAME[signal] if isinstance(signal, str) else signal
    if cells is None:
        cells = Cells(signal.axes, tuple(tuple(f"{a}{i}" for a in signal.axes) for i in range(len(values))))
    mask = np.ones(len(values), np.bool_) if seen is None else np.array(seen, np.bool_)
    return Reading(signal, cells, np.where(mask, np.array(values, np.float32), np.nan).astype(np.float32), mask)


def frame(step: int, *readings: Reading, lane: Lane = "slow", run: RunInfo | None = None, **known: object) -> Frame:
    return Frame(step, lane, {r.signal.name: r for r in readings}, run or RunInfo(run_id="r"), **known)  # type: ignore[arg-type]


def feed(
    rule: Rule, series: Iterable[float], signal: Signal | str = X, *, every: int = 1, run: RunInfo | None = None
) -> list[Verdict | None]:
    """What the rule says to each value of a one-cell series."""
    said: list[Verdict | None] = []
    for i, value in enumerate(series):
        verdicts = rule.update(frame(i * every, reading([value], signal), run=run))
        assert len(verdicts) <= 1
        said.append(verdicts[0] if verdicts else None)
    return said


def active_at(said: Sequence[Verdict | None]) -> list[int]:
    return [i for i, verdict in enumerate(said) if verdict is not None and verdict.active]
