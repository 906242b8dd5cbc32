"""Failures of the gradient."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding, Witness, rules_of
from traindiag.alerts.diagnosis.optimizer import RMS_T
from traindiag.alerts.diagnosis.remedies import (
    OLMO2,
    clip,
    go_back,
    longer_warmup,
    lower_beta2,
    lower_lr,
    skip_batches,
)
from traindiag.alerts.diagnosis.wording import change_of, said_by, usual
from traindiag.rules.wording import number

NORMS = ("gradient/norm", "gradient/norm_applied")
_BLOCKS, _RMS = "gradient/block_norm", "gradient/rms"

WITH_LOSS = 2.0
"""Least ratio of a gradient norm to the one before that counts as a jump where the loss jumps in the same step."""

SOLVED = 0.01
"""Share of the first loss below which small gradients mean that there is nothing left to learn."""

UNEVEN = 1e-3
"""Ratio of the first to the last block's gradient that AutoTrainer (Zhang et al. 2021, ICSE) calls vanishing."""


class CorruptBatch(Failure):
    """Loss and gradient jump in the same step, and nothing before it was out of the ordinary.

    The loss of a step is that of the weights before it, so a jump that no earlier update explains came with the data.
    """

    name = "corrupt batch"
    family = "loss"
    signals = ("loss/*", *NORMS, *RMS_T)
    kinds = ("spike", "threshold")

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.kind == "threshold" and verdict.signal not in RMS_T:
            return None
        loss = _among(case, "loss/*")
        gradient = _among(case, *NORMS)
        if loss is None or verdict.step - loss.since > 2:
            return None
        if not (_jumped_with(case, loss) if gradient is None else loss.since == gradient.since):
            return None
        if not case.memory.rose(loss.last.value):
            return None
        if any(
            w.since < loss.since and w.last.severity != "info" and w.last.kind != "wiring" for w in case.witnesses
        ):
            return None  # it was on its way already
        step, moment = loss.since, case.healthy(RMS_T[1]) or case.healthy(RMS_T[0])
        return Finding(
            f"The batch of step {step} is out of the ordinary",
            "Loss and gradient jumped in the same step, and the loss of a step is that of the weights before it: "
            "what changed is the data. Corrupt or repeated samples, wrong labels, an input that is not normalised.",
            _where(case),
            usual("a stale second moment: RMS_t before", moment, 2.3)
            + usual("updates out of proportion: the ratio", case.now("optimizer/update_ratio"), 0.1),
            (
                Remedy(
                    f"Look at the samples of step {step}{_called(case, step)}: length, repetition, labels, range.",
                    when="now",
                ),
                *clip(case.run),
                skip_batches(step),
            ),
            rules_of(loss, gradient, case.by(*RMS_T)),
        )


def _called(case: Case, step: int) -> str:
    names = case.memory.batches(step)
    return f" ({'; '.join(names)})" if names else ""


def _jumped_with(case: Case, loss: Witness) -> bool:
    """Whether the gradient norm has doubled in the step of the loss, be it not enough for a rule of its own."""
    for norm in NORMS:
        now, before = case.now(norm), case.healthy(norm)
        if now is not None and before is not None:
            return now.step == loss.since and now.high >= WITH_LOSS * before.high
    return False


class GradientJump(Failure):
    """The gradient norm jumped, and nothing else says why."""

    name = "gradient-norm jump"
    family = "gradient"
    signals = (*NORMS, "gradient/block_norm", "gradient/parameter_norm")
    kinds = ("spike", "shift")

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        if verdict.limit is not None and verdict.value < verdict.limit:
            return None
        loss = case.by("loss/*", kinds=("spike",))
        ruled_out: tuple[str, ...] = (
            (f"an unclipped step: gradients are clipped at {number(run.clip[1])}",) if run.clip else ()
        )
        ruled_out += usual("a stale second moment: RMS_t", case.now(RMS_T[1]) or case.now(RMS_T[0]), 2.3)
        note = Remedy(
            "Save a checkpoint; if the loss follows within some steps, go back and skip these batches.", when="now"
        )
        return Finding(
            f"Gradient norm jumped{case.at}",
            "An unusual batch, or a second moment that underestimates the gradients it now meets. Most jumps pass "
            "without harm; loss spikes are often preceded by one.",
            _where(case),
            ruled_out,
            (*clip(run), *lower_beta2(run, case.optimizers()), note),
            rules_of(loss),
        )


class GradientGrowth(Failure):
    """The gradient norm grows slowly."""

    name = "gradient-norm growth"
    family = "gradient"
    signals = (*NORMS, "gradient/block_norm", "gradient/rms")
    kinds = ("trend", "forecast", "threshold")

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.kind == "threshold" and (verdict.limit is None or verdict.value < verdict.limit):
            return None
        healthy, now = case.memory.earlier(verdict.signal), case.now(verdict.signal)
        if verdict.kind == "trend" and healthy is not None and now is not None and now.high < healthy.high:
            return None
        run = case.run
        return Finding(
            f"Gradient norm is growing{case.at}",
            "A slow growth of the gradient norm goes before more and larger jumps. Behind it are growing logits or "
            "activations, weights that grow without decay, or an initialisation that does not keep its scale.",
            change_of(case, verdict.signal) if verdict.kind != "trend" else (),
            usual("attention-logit growth: attention/logit_range", case.now("attention/logit_range"), 100.0),
            (*lower_lr(run, source=f"{OLMO2} section 3.1"), *clip(run), *longer_warmup(run)),
        )


class AlwaysClipped(Failure):
    """Clipping decides the size of most steps."""

    name = "clipped at most steps"
    family = "gradient"
    signals = ("gradient/clip_rate",)

    def diagnose(self, case: Case) -> Finding | None:
        run, level = case.run, case.healthy("gradient/norm") or case.now("gradient/norm")
        remedies = []
        evidence: tuple[str, ...] = ()
        if run.clip is not None and level is not None:
            evidence = (
                f"gradient/norm is {number(level.high)} (step {level.step}), the limit {number(run.clip[1])}",
            )
            if level.high > run.clip[1]:
                higher = float(f"{1.5 * level.high:.1g}")
                remedies.append(
                    Remedy(
                        f"Raise the limit of clipping from {number(run.clip[1])} to {number(higher)}.",
                        {"clip": higher},
                        "restart",
                        "Deep Learning Tuning Playbook: a limit near the 90th percentile of the norm",
                    )
                )
        source = "Deep Learning Tuning Playbook: where more than half of the updates are clipped"
        return Finding(
            f"Most gradients are clipped{case.at}",
            "A limit that most gradients exceed is a schedule of its own: steps have the size of the limit, "
            "whatever the gradient.",
            evidence,
            (),
            (*lower_lr(run, source=source), *remedies),
        )


class VanishingGradients(Failure):
    """Gradients fade, over depth or as a whole."""

    name = "vanishing gradients"
    family = "gradient"
    signals = (_BLOCKS, _RMS, *NORMS, "gradient/parameter_norm")
    kinds = ("threshold", "trend", "spike", "shift", "forecast")

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        healthy = case.memory.earlier(verdict.signal) or case.before(verdict.signal)
        if verdict.limit is not None and verdict.value > verdict.limit:
            return None
        if verdict.limit is None and (healthy is None or not verdict.value < healthy.high):
            return None
        loss, first = case.now("loss/value"), case.memory.first("loss/value")
        if loss is not None and first is not None and 0 <= loss.high < SOLVED * first.high:
            return None  # nothing left to learn
        blocks = case.now(_BLOCKS)
        evidence: tuple[str, ...] = ()
        ruled_out: tuple[str, ...] = (
            ("tensors without a gradient by construction: they are left out",) if verdict.signal == _RMS else ()
        )
        deep = False
        if blocks is not None and blocks.high > 0:
            ratio = blocks.low / blocks.high
            deep = ratio < UNEVEN
            text = (
                f"gradient norms of blocks lie between {number(blocks.low)} ({blocks.low_at}) and "
                f"{number(blocks.high)} ({blocks.high_at}) (step {blocks.step})"
            )
            if deep:
                evidence = (text,)
            else:
                ruled_out += (f"fading over depth: {text}",)
        if loss is not None:
            ruled_out += (f"a loss that is solved: it is {number(loss.high)} (step {loss.step})",)
        layers = sum(n for kind, n in run.normalisation.items() if kind != "query_key")
        remedies = [
            Remedy(
                "Add residual connections around blocks that have none.",
                when="next run",
                source="He et al. 2016, arXiv 1512.03385",
            ),
            Remedy(
                "Use ReLU, GELU or SiLU in the place of sigmoid and tanh, whose slope vanishes where they saturate.",
                when="next run",
                source="Glorot & Bengio 2010",
            ),
            Remedy(
                "Initialise weights with variance 2 / fan-in before rectifiers, 1 / fan-in elsewhere.",
                when="next run",
                source="He et al. 2015, arXiv 1502.01852",
            ),
        ]
        if not layers:
            text = "Normalise what enters each block (LayerNorm, RMSNorm or BatchNorm)."
            remedies.insert(0, Remedy(text, when="next run", source="Ioffe & Szegedy 2015, arXiv 1502.03167"))
        if not deep:
            remedies = [*lower_lr(run, source="saturated units come from large steps"), *remedies]
        return Finding(
            f"Gradients are vanishing{case.at}",
            "On the way back each layer multiplies the gradient by less than one: too small weights, saturated "
            "units, no residual path."
            if deep
            else "The gradient has become small everywhere: saturated units or an output that has stopped to depend "
            "on its input.",
            evidence,
            ruled_out,
            tuple(remedies),
        )


class LossSpike(Failure):
    """The loss jumped, and nothing says why."""

    name = "loss spike"
    family = "loss"
    signals = ("loss/*",)
    kinds = ("spike", "shift")

    def diagnose(self, case: Case) -> Finding | None:
        if case.verdict.limit is not None and case.verdict.value < case.verdict.limit:
            return None
        gradient = case.by(*NORMS, kinds=("spike",))
        before = gradient is not None and gradient.since < case.since
        evidence = said_by(gradient) if before else ()
        cause = (
            "The step before it was taken with an outlying gradient."
            if before
            else "A confirmation, not a forecast: the damage is done. Where the gradient was as usual, "
            "look at the data first."
        )
        ruled_out = usual("a stale second moment: RMS_t", case.now(RMS_T[1]) or case.now(RMS_T[0]), 2.3)
        return Finding(
            f"The loss jumped{case.at}",
            cause,
            evidence,
            ruled_out,
            (
                *(clip(case.run) if before else ()),
                skip_batches(case.verdict.step),
                *lower_lr(case.run),
                go_back(case.since, "if the loss does not return within some tens of steps"),
            ),
            rules_of(gradient),
        )


def _where(case: Case) -> tuple[str, ...]:
    """Whether the jump is one tensor's, which points at a part of the model, or that of all."""
    share = case.memory.share()
    if share is None:
        return ()
    tensor, part = share
    return (f"{tensor} has {part:.0%} of it" + (", more than all others" if part > 0.5 else ", the largest part"),)


def _among(case: Case, *signals: str) -> Witness | None:
    """The witness on one of these signals with a jump, the verdict's own included."""
    own = Witness(case.verdict, case.since)
    for witness in (own, *case.witnesses):
        if witness.last.kind == "spike" and any(
            witness.last.signal == s or (s.endswith("*") and witness.last.signal.startswith(s[:-1])) for s in signals
        ):
            return witness
    return None
