"""What became of the first task when training turned to another, in words and measured numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from traindiag.alerts.alert import Alert
from traindiag.demo.continual import Outcome
from traindiag.record.continual import Gap
from traindiag.record.series import History


@dataclass(frozen=True, slots=True)
class Story:
    """The facts of one run.

    Args:
        outcome: The run.
        alerts: Those of the stability family, oldest first.
        gap: What the last shift did to English, None where none was found.
        found: Step of the shift that was found first, and its reasons.
        evaluated: Steps at which English was evaluated.
    """

    outcome: Outcome
    alerts: tuple[Alert, ...]
    gap: Gap | None
    found: tuple[int, str] | None
    evaluated: tuple[int, ...]

    @classmethod
    def of(cls, outcome: Outcome, alerts: Sequence[Alert], history: History, gap: Gap | None) -> Story:
        """Puts together what a run has left."""
        found = None
        if "stability/shift" in history:
            shifts = history["stability/shift"]
            reasons = [shifts.cells.label(int(i)) for i in np.flatnonzero(shifts.seen[0])]
            found = int(shifts.steps[0]), " and ".join(reasons)
        evaluated = tuple(int(s) for s in history["stability/loss"].steps)
        ours = tuple(a for a in alerts if a.family == "stability")
        return cls(outcome, ours, gap, found, evaluated)

    @property
    def warning(self) -> Alert | None:
        """The first message at WARNING or above."""
        return next((a for a in self.alerts if a.severity != "info" and a.status != "closed"), None)

    @property
    def evaluations(self) -> int | None:
        """How many evaluations after the switch the warning came with."""
        if self.warning is None:
            return None
        return sum(self.outcome.phases.english <= step <= self.warning.step for step in self.evaluated)

    @property
    def call(self) -> str:
        """What the warning said that it was likely to become: ``transient``, ``forgetting``, or nothing."""
        if self.warning is None:
            return ""
        return "transient" if self.warning.diagnosis == "stability gap" else "forgetting"

    @property
    def verdict(self) -> str:
        """What became of it in the end."""
        return "none" if self.gap is None else self.gap.final

    @property
    def before_the_switch(self) -> tuple[Alert, ...]:
        """Messages before the switch, of which there should be none."""
        return tuple(a for a in self.alerts if a.step < self.outcome.phases.english)

    def lines(self) -> list[tuple[str, str]]:
        """The story as pairs of a label and a sentence."""
        phases = self.outcome.phases
        told = [("switch", f"at step {phases.english}, with {phases.replay:.0%} of English in each batch from there")]
        if self.found is None:
            return [*told, ("found", "no shift")]
        step, reasons = self.found
        told.append(("found", f"at step {step}, nobody having told it: {reasons}"))
        told.append(("warned", self._warned()))
        gap = self.gap
        if gap is None or not gap.evaluations:
            return told
        told.append(
            (
                "English",
                f"{gap.baseline:.3f} nats per byte before; {gap.depth:.3f} worse ({gap.relative_depth:.0%}) at its "
                f"worst, {gap.trough} steps after the switch"
                if gap.trough is not None
                else f"{gap.baseline:.3f} nats per byte before, and never worse",
            )
        )
        back = (
            f"back {gap.recovery} steps after the switch"
            if gap.recovery is not None
            else f"not back after {gap.age} steps"
        )
        left = f"{abs(gap.residual):.3f} nats {'worse' if gap.residual > 0 else 'better'} than before at the end"
        told.append(("recovery", f"{back}, {left}"))
        losses = self.outcome.losses[phases.english :]
        if len(losses) >= 2 * _EDGE:
            first, last = np.mean(losses[:_EDGE]), np.mean(losses[-_EDGE:])
            told.append(
                ("training", f"loss {first:.2f} in {_EDGE} steps after the switch, {last:.2f} in the last {_EDGE}")
            )
        told.append(("verdict", _VERDICTS[self.verdict]))
        return told

    def _warned(self) -> str:
        warning = self.warning
        if warning is None:
            return "never: nothing at WARNING or above"
        count = self.evaluations
        likely = {"transient": "likely to pass", "forgetting": "likely forgetting"}[self.call]
        return f"at step {warning.step}, with evaluation {count} after the switch: {warning.diagnosis}, {likely}"

    def row(self) -> tuple[str, ...]:
        """Its line in a comparison."""
        gap = self.gap
        depth = math.nan if gap is None else gap.depth
        residual = math.nan if gap is None else gap.residual
        back = "never" if gap is None or gap.recovery is None else f"{gap.recovery} steps"
        return (
            f"{self.outcome.phases.replay:.0%}",
            "never" if self.warning is None else f"look {self.evaluations}",
            self.call,
            f"{depth:.3f}",
            back,
            f"{residual:+.3f}",
            self.verdict,
        )


_EDGE = 20

HEADINGS = ("kept", "warned", "called", "deepest", "back after", "at the end", "verdict")

_VERDICTS = {
    "none": "no gap: English has not suffered",
    "transient": "transient: a stability gap, and it has passed",
    "partial": "partial: half and more of it has come back",
    "forgetting": "forgetting: most of what was lost is lost still",
}
