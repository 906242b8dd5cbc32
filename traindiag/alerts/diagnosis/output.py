"""Failures of the output logits."""

from __future__ import annotations

from typing import Any

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.remedies import PALM, PROXIES, key, lower_lr, peak_lr
from traindiag.alerts.diagnosis.wording import usual
from traindiag.rules.wording import number

_LOG_Z, _Z_SCORE = "output/log_z", "output/target_z_score"

LEARNING = 1.1
"""A target that stands out of its logits by a tenth more than earlier in the run is being learned, and larger logits
are how it is. Ours: the sources give no number."""

Z_LOSS = 1e-4
"""Weight of (log Z)^2 in PaLM and in the runs of arXiv 2309.14322."""


class OutputLogitDivergence(Failure):
    """The output logits drift, which cross-entropy does not hold, and nothing is learned by it."""

    name = "output-logit divergence"
    family = "output"
    signals = (_LOG_Z, "output/log_z_max_abs", "output/z_loss", "output/logit_*")

    def diagnose(self, case: Case) -> Finding | None:
        earlier, score = case.memory.earlier(_Z_SCORE), case.now(_Z_SCORE)
        ruled_out: tuple[str, ...] = ()
        if earlier is not None and score is not None and _Z_SCORE not in case.verdict.evidence:
            # unless the rule has looked at it by itself
            if score.middle >= LEARNING * max(earlier.middle, 0.0):
                return None
            ruled_out = (
                f"learning: {_Z_SCORE} was {number(earlier.middle)} at step {earlier.step} and is "
                f"{number(score.middle)} (step {score.step})",
            )
        then, now = case.memory.earlier(_LOG_Z), case.now(_LOG_Z)
        evidence: tuple[str, ...] = ()
        if case.verdict.signal != _LOG_Z and then is not None and now is not None:
            evidence = (f"{_LOG_Z} was {number(then.middle)} at step {then.step} and is {number(now.middle)}",)
        ruled_out += usual("attention-logit growth: attention/logit_range", case.now("attention/logit_range"), 100.0)
        return Finding(
            f"Output logits are drifting{case.at}",
            "Cross-entropy leaves a common shift of all logits free, and nothing pulls log Z back to zero: logits "
            "become very negative until their rounding, and then the loss, goes with them. Known late in training "
            "and without weight decay.",
            evidence,
            ruled_out,
            (
                Remedy(
                    f"Add a z-loss: {number(Z_LOSS)} times the mean of (log Z)^2.",
                    {"loss.z_loss": Z_LOSS},
                    "restart",
                    f"{PALM} section 5; {PROXIES} section 3.1.2",
                ),
                *_weight_decay(case),
                *lower_lr(case.run, source=f"{PROXIES} section 3.1.2"),
            ),
        )


def _weight_decay(case: Case) -> list[Remedy]:
    """What decoupled decay must be for a twentieth of a percent a step at the peak, as in the runs of the source."""
    remedies = []
    for optimizer in case.run.optimizers:
        decay, peak = optimizer.settings.get("weight_decay"), peak_lr(optimizer)
        if decay == 0 and peak is not None and optimizer.kind == "AdamW":
            wanted = float(f"{1e-4 / peak:.0e}")
            change: dict[str, Any] = {key(case.run, optimizer, "weight_decay"): wanted}
            text = f"Decay the weights of {optimizer.kind} by {wanted:g}, those of the output layer at least."
            source = f"{PROXIES} section 3.1.2; 1e-4 a step at the peak learning rate of {peak:g}"
            remedies.append(Remedy(text, change, "restart", source))
    return remedies
