"""Failures of the optimizer."""

from __future__ import annotations

import math

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding, rules_of
from traindiag.alerts.diagnosis.remedies import (
    PROXIES,
    SPIKES,
    clip,
    key,
    longer_warmup,
    lower_beta2,
    lower_lr,
    skip_batches,
)
from traindiag.alerts.diagnosis.wording import change_of, said_by, usual
from traindiag.record.run_info import OptimizerInfo
from traindiag.rules.wording import number

RMS_T = ("optimizer/rms_t", "optimizer/sentinel_rms_t")
LOSS_SPIKE = ("loss/*",)
_RATIO = "optimizer/update_ratio"
_EPS = "optimizer/grad_rms_over_eps"

NEAR_EPS = 10.0
"""Gradient RMS in units of epsilon below which epsilon takes a tenth of an update and more."""

SMALL_EPS = 1e-15
"""What arXiv 2309.14322 section 3.4 lowers epsilon to, from 1e-8."""

LARGE_UPDATE = 0.1
"""Update-to-weight ratio that TheDeepChecker calls too large."""

RAISED = 1.5
"""Learning rate in units of its planned peak from which it was raised: the distance of two regimes in
:mod:`traindiag.rules.baseline`."""

GOOD_UPDATE = 0.03
"""A place down the 1-3-10 ladder from it."""


class EpsilonRegime(Failure):
    """Gradients have fallen to the size of epsilon, which then decides how large updates are."""

    name = "epsilon regime"
    family = "optimizer"
    signals = (_EPS,)

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.kind == "threshold" and not verdict.value < NEAR_EPS:
            return None
        evidence = change_of(case, _EPS, low=True)
        if verdict.value > 0:
            evidence += (f"epsilon leaves {1 / (1 + 1 / verdict.value):.0%} of its update",)
        remedies = []
        for optimizer in case.optimizers():
            eps = optimizer.settings.get("eps")
            if isinstance(eps, (int, float)) and eps > SMALL_EPS:
                text = f"Lower eps of {optimizer.kind} from {number(eps)} to {number(SMALL_EPS)}."
                change = {key(case.run, optimizer, "eps"): SMALL_EPS}
                remedies.append(Remedy(text, change, "restart", f"{PROXIES} section 3.4"))
        return Finding(
            f"Gradients are as small as the optimizer's epsilon{case.at}",
            "Adam divides by the square root of the second moment plus epsilon. Where gradients are no larger than "
            "epsilon the quotient shrinks, the tensor stops learning, and its layer may collapse. Gradients become "
            "smaller with the size of the model and with the learning rate.",
            evidence,
            ("a tensor whose gradient is zero by construction: those are left out until they come alive",),
            (*remedies, *lower_lr(case.run, source=f"{PROXIES} section 3.4: gradients fall as it rises")),
        )


class StaleSecondMoment(Failure):
    """The second moment has fallen behind the gradients: updates are too large for some steps.

    A batch that is out of the ordinary raises RMS_t as well, but the loss with it in the same step; here the loss
    follows.
    """

    name = "stale second moment"
    family = "optimizer"
    signals = (*RMS_T, "gradient/norm", "gradient/norm_applied", "loss/*")

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        loss = case.by(*LOSS_SPIKE, kinds=("spike", "shift"))
        behind = case.by(*RMS_T)
        if verdict.signal in RMS_T:
            if loss is not None and loss.since <= case.since:
                return None
            since, said = case.since, verdict
        else:
            if behind is None or verdict.kind not in ("spike", "shift") or behind.since >= case.since:
                return None
            since, said = behind.since, behind.last
        gradient = case.by("gradient/norm", "gradient/norm_applied", kinds=("spike",))
        optimizers = _of(case, said.cell.coordinates[0] if said.cell.coordinates else None)
        evidence = () if said is verdict else said_by(behind)
        ceilings = {b: 1 / math.sqrt(1 - b) for o in optimizers if (b := _beta2(o)) is not None and b < 1}
        for beta2, ceiling in ceilings.items():
            evidence += (f"at most {ceiling:.3g} is possible at beta2 {beta2:g}",)
        if loss is not None and loss.last is not verdict:
            evidence += (f"the loss followed after {loss.since - since} steps",)
        ruled_out: tuple[str, ...] = ()
        if verdict.signal in RMS_T and loss is None:
            level = case.now("loss/value")
            if level is not None:
                ruled_out = (f"a bad batch: the loss is {number(level.high)} as before (step {level.step})",)
        elif since < case.since:
            ruled_out = (f"a bad batch: the second moment was behind {case.since - since} steps before",)
        return Finding(
            f"The second moment has fallen behind the gradients at {said.cell}",
            "Gradients were small for a while and the second moment went down with them; now they are back, and "
            "what Adam divides by is too small for them. Loss spikes follow within 1 to 8 steps, in large models "
            "most often through the embedding.",
            evidence,
            ruled_out,
            (
                *lower_beta2(case.run, optimizers),
                Remedy(
                    "Clip updates: divide the learning rate of a tensor by max(1, RMS_t) (StableAdamW).",
                    {},
                    "restart",
                    f"{SPIKES}: better than clipping gradients",
                ),
                *clip(case.run),
                *lower_lr(case.run, source=f"{SPIKES}: more spikes at higher learning rates"),
                skip_batches(verdict.step),
            ),
            rules_of(behind, loss, gradient),
        )


class LearningRateTooHigh(Failure):
    """Updates are large against the weights in the model as a whole."""

    name = "learning rate too high"
    family = "optimizer"
    signals = (_RATIO,)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, level = case.verdict, case.now(_RATIO)
        if verdict.kind == "threshold" and verdict.limit is not None and verdict.value < verdict.limit:
            return None  # below a lower limit
        seen = case.frame.readings.get(_RATIO)
        most = seen is not None and verdict.others > 0 and 2 * (verdict.others + 1) >= int(seen.seen.sum())
        if level is not None and level.middle < GOOD_UPDATE and not most:
            return None  # one tensor that started at zero, as LoRA's B does, is no matter of the learning rate
        ratio = level.middle if level is not None else verdict.value
        rates = [r for r in case.frame.learning_rates.values() if r > 0]
        at_most = max(rates) * GOOD_UPDATE / ratio if rates and 0 < ratio < math.inf else math.inf
        evidence = change_of(case, _RATIO)
        if level is not None:
            evidence += (f"its median over tensors is {number(level.middle)} (step {level.step})",)
        if rates:
            evidence += (f"the learning rate is {number(max(rates))}",)
        return Finding(
            f"Updates are too large for the weights{case.at}",
            "Each step replaces a large part of the weights, so that what was learned is overwritten. Usually the "
            "learning rate is too high, or its warm-up too short.",
            evidence,
            usual("a stale second moment: RMS_t", case.now("optimizer/rms_t"), 2.0),
            (
                *lower_lr(
                    case.run,
                    at_most=at_most,
                    source=f"brings the median update to {GOOD_UPDATE:g} of the weights; TheDeepChecker's limit is "
                    f"{LARGE_UPDATE:g}",
                ),
                *longer_warmup(case.run),
            ),
        )


class LearningRateRaised(Failure):
    """Something goes wrong while the learning rate is far above the peak that the run began with.

    Whatever gives way first, logits, units or the stream, the learning rate is what changed.
    """

    name = LearningRateTooHigh.name
    family = LearningRateTooHigh.family
    signals = (
        _RATIO, _EPS, "activation/rms", "activation/growth_exponent", "activation/zero_fraction", "attention/*",
        "gradient/block_norm",
    )  # fmt: skip
    kinds = ("threshold", "trend", "forecast", "shift")

    def diagnose(self, case: Case) -> Finding | None:
        raised = case.raised(RAISED)
        if not raised or (case.verdict.severity == "info" and case.verdict.signal.startswith("attention/")):
            return None
        now, before = case.now(_RATIO), case.memory.earlier(_RATIO)
        if now is not None and before is not None and now.middle < before.middle:
            return None  # the weights have grown with it
        rate, peak = max(raised)
        evidence: tuple[str, ...] = (f"the learning rate is {number(rate)}, the peak of its plan {number(peak)}",)
        if now is not None and before is not None:
            evidence += (
                f"the median update was {number(before.middle)} of the weights at step {before.step} and is "
                f"{number(now.middle)} (step {now.step})",
            )
        return Finding(
            f"The learning rate is too high, and {case.verdict.signal} shows it{case.at}",
            "The learning rate was raised while the run was under way. What gives way first differs from model to "
            "model: logits, units, the residual stream or the scale of gradients.",
            evidence,
            (),
            (
                Remedy(
                    f"Bring the learning rate back from {number(rate)} to {number(peak)}.",
                    {key(case.run, o, "lr"): o.peak_lr for o in case.frame.run.optimizers},
                    "restart",
                    "the last learning rate that this run was healthy with",
                ),
                *longer_warmup(case.run),
            ),
        )


class OutOfProportion(Failure):
    """One tensor's updates are large against its weights, and those of the others are not."""

    name = "update out of proportion"
    family = "optimizer"
    signals = (_RATIO,)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, level = case.verdict, case.now(_RATIO)
        if level is None or (verdict.limit is not None and verdict.value < verdict.limit):
            return None
        median = f"the median is {number(level.middle)}"
        return Finding(
            f"Updates of some tensors are large for their weights{case.at}",
            "Their weights are small: they started at zero, as LoRA's B and a bias do, or weight decay has shrunk "
            "them.",
            (),
            (f"a learning rate that is too high: {median} over tensors (step {level.step})",),
            (Remedy("Nothing, if the ratio falls within some tens of steps as the tensor grows.", when="now"),),
        )


def _of(case: Case, name: object) -> tuple[OptimizerInfo, ...]:
    return tuple(o for o in case.run.optimizers if o.name == name) or case.run.optimizers


def _beta2(optimizer: OptimizerInfo) -> float | None:
    betas = optimizer.settings.get("betas")
    return float(betas[1]) if isinstance(betas, (list, tuple)) and len(betas) == 2 else None
