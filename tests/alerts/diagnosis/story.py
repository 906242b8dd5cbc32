"""A run told by hand: frames with numbers, and what rules said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.rules.frames import reading
from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook
from traindiag.record.cells import Cell, Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.record.signal import Lane
from traindiag.rules.rule import Severity, Verdict

ADAMW = OptimizerInfo(
    "adam", "AdamW", {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}, peak_lr=0.1
)
RUN = RunInfo(
    "r", optimizers=(ADAMW,), depth=8, length=4000, warmup=20, precision="32-true", normalisation={"LayerNorm": 17}
)

Numbers = Mapping[str, float | Sequence[float] | Mapping[str, float]]


def said(
    signal: str,
    kind: str,
    value: float,
    limit: float | None = None,
    *,
    severity: Severity = "warning",
    at: Cell | None = None,
    rule: str = "",
    **more: Any,
) -> Verdict:
    """A verdict; its step is that of the frame that it goes with."""
    evidence = f"{signal} is {value:g} ({kind})"
    cell = at or Cell((), ())
    known = {"severity": severity, "cell": cell, "value": value, "limit": limit, "evidence": evidence}
    return Verdict(rule or f"{signal} {kind}", kind, signal, 0, **{**known, **more})


def over(verdict: Verdict) -> Verdict:
    """Its condition has ended."""
    return replace(verdict, active=False)


class Story:
    """Plays a run to an :class:`AlertBook`."""

    def __init__(self, run: RunInfo = RUN, book: AlertBook | None = None) -> None:
        self.run = run
        self.book = book or AlertBook("r")

    def at(
        self,
        step: int,
        numbers: Numbers,
        *verdicts: Verdict,
        lane: Lane = "slow",
        rate: float = 0.1,
        **known: Any,
    ) -> list[Alert]:
        """One frame. A number stands for one cell, a list for some, a mapping gives the last coordinate of each."""
        readings = {name: _reading(name, values) for name, values in numbers.items()}
        made = Frame(step, lane, readings, self.run, learning_rates={"adam": rate}, **known)
        return self.book.update(made, [replace(v, step=step) for v in verdicts])

    def calm(self, until: int, numbers: Numbers, *, lane: Lane = "fast") -> None:
        """The same numbers at every step from 0 to before ``until``."""
        for step in range(until):
            assert self.at(step, numbers, lane=lane) == []


def _reading(name: str, values: float | Sequence[float] | Mapping[str, float]) -> Reading:
    if isinstance(values, Mapping):
        made = reading([0.0], name)
        front = ("adam",) if made.cells.axes[0] == "optimizer" and len(made.cells.axes) > 1 else ()
        cells = Cells(made.cells.axes[: len(front) + 1], tuple((*front, at) for at in values))
        return reading(list(values.values()), name, cells)
    return reading([values] if isinstance(values, (int, float)) else values, name)


def changes(alert: Alert) -> dict[str, Any]:
    """All settings that an alert's remedies change."""
    return {k: v for r in alert.remedies for k, v in r.change.items()}
