"""Failures of a resumed job."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.rules.wording import names_of

AFTERMATH = 100
"""Steps after a resume in which a missing state explains a jump: at beta2 0.95 a second moment is whole after some
tens, at 0.999 its bias correction carries it."""


class LostOptimizerState(Failure):
    """A job was resumed and its optimizer began anew: no momentum, no second moment."""

    name = "resumed without optimizer state"
    family = "wiring"
    signals = ("wiring/state_lost", "loss/*", "gradient/norm", "gradient/norm_applied", "optimizer/*")

    def diagnose(self, case: Case) -> Finding | None:
        lost = case.run.lost_state
        if not lost:
            return None
        named = sorted(f"{name} (step {step})" for name, step in lost.items())
        if case.verdict.signal != "wiring/state_lost":
            if case.verdict.kind not in ("spike", "shift", "threshold"):
                return None
            if all(case.since - step > AFTERMATH or case.since < step for step in lost.values()):
                return None
        return Finding(
            f"The job was resumed without the state of {names_of(sorted(lost))}",
            "Momentum and second moment begin at zero in the middle of the run, at the learning rate of its middle: "
            "the first updates are as large as at the start, without warm-up.",
            (f"no state at the first update after the resume: {names_of(named)}",),
            (),
            (
                Remedy(
                    "Stop, and resume with the optimizer's state_dict loaded before the first step.",
                    when="now",
                ),
                Remedy(
                    "Without a saved state: warm up the learning rate again from 0.",
                    when="restart",
                    source="a second moment at zero makes the first updates of Adam as large as the learning rate",
                ),
            ),
        )
