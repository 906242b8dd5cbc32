"""A second moment that has fallen behind the gradients it now meets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.cells import Cells
from traindiag.record.frame import FloatArray, Frame, Reading
from traindiag.record.run_info import RunInfo
from traindiag.rules import arguments
from traindiag.rules.baseline import Course
from traindiag.rules.cell_table import CellTable, verdict_at
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

USUAL_BETA2 = 0.999
"""PyTorch's default, for optimizers whose settings are not known."""


class StaleSecondMoment(Rule):
    """Speaks when RMS_t, the gradient in units of the second moment, comes near to what it can be at most.

    Where all of a gradient is new, v = (1 - beta2) g^2 after the update, so RMS_t is at most 1 / sqrt(1 - beta2):
    31.6 for beta2 = 0.999, but 4.5 for 0.95, where a fixed limit of 2.3 is half of that and met by ordinary noise. A
    cell fails beyond ``above`` and beyond ``share`` of its optimizer's ceiling. In the first steps every gradient
    is new; they are not judged, and neither are those of the learning rate's warm-up. NaN and infinity are
    :class:`~traindiag.rules.nonfinite.NonFinite`'s business.

    Of an RMS_t that scatters around 1 (log-normal of sigma 0.35, independent or AR(0.9)) it says nothing in 400,000
    values, and with a fixed limit of 5 at most once in 100,000; a fixed limit of 2.3 speaks 80 times in 10,000.

    Args:
        above: Least RMS_t that counts.
        share: Share of the ceiling that counts.
        signal: ``optimizer/sentinel_rms_t`` (every step) or ``optimizer/rms_t`` (samples).
        settle: Steps after the first that are not judged, in units of 1 / (1 - beta2), at most.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Wortsman et al. 2023, Stable and low-precision training, arXiv 2304.13013: loss spikes follow 1 to 8 steps
        after RMS_t of the embedding has risen.
    """

    patient = True  # twice the usual RMS_t stirs, and less is none

    def __init__(
        self,
        *,
        above: float = 2.3,
        share: float = 0.75,
        signal: str = "optimizer/sentinel_rms_t",
        settle: float = 2.0,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "info",
        name: str = "optimizer/stale-second-moment",
    ) -> None:
        arguments.above(1.0, above=above)
        arguments.share(share=share)
        arguments.above(0.0, settle=settle)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        if signal not in ("optimizer/sentinel_rms_t", "optimizer/rms_t"):
            raise ValueError(f"signal must be optimizer/sentinel_rms_t or optimizer/rms_t, got {signal!r}")
        self.above, self.share, self.signal, self.signals = above, share, signal, (signal,)
        self.settle, self.cooldown, self.where, self.severity, self.name = settle, cooldown, where, severity, name
        self._table = CellTable(where, active=False)
        self._course = Course()
        self._limits: tuple[tuple[RunInfo, Cells], FloatArray, FloatArray] | None = None

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(self.signal)
        if reading is None:
            return ()
        warming = self._course.follow(frame).warming
        values, seen = self._table.align(reading)
        assert self._table.cells is not None
        limits, settled = self._of(frame.run, self._table.cells)
        was = self._table["active"]
        failing = seen & (values > limits) & (values < np.inf) & (frame.step >= settled)
        if warming:
            failing[:] = False
        if not (failing.any() or was.any()):
            return ()
        self._table["active"] = now = np.where(seen & np.isfinite(values), failing, was)
        if failing.any():
            at = int(np.argmax(np.where(failing, values / limits, 0)))
            value, others = float(values[at]), int(failing.sum()) - 1
            ceiling = limits[at] / self.share if limits[at] > self.above else math.inf
            near = f", near the {number(ceiling)} of a gradient that is all new" if math.isfinite(ceiling) else ""
            evidence = f"{self.signal} is {number(value)}, above {number(float(limits[at]))}{near}{more(others)}"
            return (self._verdict(frame, reading, at, value, float(limits[at]), evidence, others),)
        if now.any():
            return ()
        at = int(np.flatnonzero(was)[0])
        evidence = f"{self.signal} is back at {number(float(values[at]))}"
        return (self._verdict(frame, reading, at, float(values[at]), None, evidence, active=False),)

    def _of(self, run: RunInfo, cells: Cells) -> tuple[FloatArray, FloatArray]:
        """Limit and first judged step of each cell, ``[n]``."""
        if self._limits is None or self._limits[0][0] is not run or self._limits[0][1] is not cells:
            beta2 = {o.name: _beta2(o.settings) for o in run.optimizers}
            decay = np.array([1 - beta2.get(str(c[0]), USUAL_BETA2) for c in cells.coordinates])
            limits = np.maximum(self.above, self.share / np.sqrt(decay)).astype(np.float32)
            longest = math.inf if run.length is None else 0.1 * run.length  # armed after a tenth of the run
            self._limits = (run, cells), limits, np.minimum(self.settle / decay, longest).astype(np.float32)
        return self._limits[1:]

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        at: int,
        value: float,
        limit: float | None,
        evidence: str,
        others: int = 0,
        active: bool = True,
    ) -> Verdict:
        return verdict_at(
            self,
            "threshold",
            frame,
            self._table,
            reading,
            at,
            severity=self.severity,
            value=value,
            evidence=evidence,
            limit=limit,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"course": self._course.state_dict(), "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._course.load_state_dict(state["course"])
        self._table.load_state_dict(state["table"])


def _beta2(settings: Mapping[str, Any]) -> float:
    """Of Adam's ``betas`` or RMSprop's ``alpha``.

    Example:
        >>> _beta2({"betas": (0.9, 0.95)}), _beta2({"alpha": 0.99}), _beta2({"lr": 1.0})
        (0.95, 0.99, 0.999)
    """
    betas = settings.get("betas")
    found = betas[1] if isinstance(betas, Sequence) and len(betas) > 1 else settings.get("alpha")
    return float(found) if isinstance(found, (int, float)) and 0 <= found < 1 else USUAL_BETA2
