"""Failures of a resumed job."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding, rules_of
from traindiag.alerts.diagnosis.optimizer import RMS_T
from traindiag.alerts.diagnosis.wording import said_by


class LostOptimizerState(Failure):
    """A job was resumed and its optimizer began anew: no momentum, no second moment."""

    name = "resumed without optimizer state"
    family = "wiring"
    signals = (*RMS_T, "loss/*", "gradient/norm", "gradient/norm_applied", "optimizer/update_ratio")

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        lost = None
        if verdict.kind != "wiring":
            lost = case.by(*RMS_T, kinds=("wiring",))
            if lost is None or lost.since > case.since:
                return None
        step = case.since if lost is None else lost.since
        remedies = [
            Remedy("Stop, and resume with the optimizer's state_dict loaded before the first step.", when="now"),
            Remedy(
                "Without a saved state: warm the learning rate up again from 0.",
                when="restart",
                source="without a second moment the first updates of Adam are as large as the learning rate",
            ),
        ]
        return Finding(
            f"The job was resumed at step {step} without the state of its optimizer",
            "Momentum and second moment began at zero in the middle of the run, at the learning rate of its middle: "
            "first updates of full size, as at the start, and without warm-up.",
            said_by(lost),
            (),
            tuple(remedies),
            rules_of(lost),
        )
