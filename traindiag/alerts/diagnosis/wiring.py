"""Parts of a run that are not connected as they should be."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.rules.rule import Verdict
from traindiag.rules.wording import number


class StructuralZeros(Failure):
    """Tensors without a gradient by construction."""

    name = "structural zeros"
    family = "wiring"
    signals = ("gradient/rms",)
    kinds = ("wiring",)

    def diagnose(self, case: Case) -> Finding | None:
        tensors, s, _, _ = _words(case.verdict)
        return Finding(
            f"{tensors} get{s} no gradient so far",
            "Usually so by construction: a key bias, which softmax cancels; LoRA's A at its first step; what stands "
            "behind a branch that starts at zero; experts that no token has reached.",
            remedies=(Remedy("Nothing, unless one of them should learn from the first step on.", when="now"),),
        )


class NoGradient(Failure):
    """The loss does not depend on a part of the model, or on all of it."""

    name = "no gradient"
    family = "wiring"
    signals = ("wiring/ungraded",)

    def diagnose(self, case: Case) -> Finding | None:
        tensors = _all_of_them(case) or _words(case.verdict)[0]
        return Finding(
            f"No gradient reaches {tensors}",
            "The loss does not depend on it: a detach, a .data, an .item(), a block under no_grad, or a module that "
            "the forward pass never calls.",
            remedies=(
                Remedy("Look for what cuts the graph between this tensor and the loss.", when="restart"),
                Remedy("If it is not to be trained, set requires_grad=False and leave it out.", when="restart"),
            ),
        )


class NotLearning(Failure):
    """Nothing, or a part of the model, changes although it has a gradient."""

    name = "not learning"
    family = "wiring"
    signals = ("wiring/unchanged", "optimizer/update_rms")

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.signal != "wiring/unchanged" and verdict.value != 0:
            return None
        tensors, _, do, have = _words(verdict)
        everything = _all_of_them(case)
        rates, precision = case.frame.learning_rates, case.run.precision
        zero = bool(rates) and not any(rates.values())
        rounded = precision is not None and precision.endswith("-true") and not precision.startswith(("32", "64"))
        evidence, ruled_out = [], []
        if zero:
            evidence.append("the learning rate is 0")
        elif rates:
            ruled_out.append(f"a schedule that has ended: the learning rate is {number(max(rates.values()))}")
        if precision is not None and not rounded:
            ruled_out.append(f"rounding of low-precision weights: precision is {precision}")
        check = Remedy("Check the learning rate of each parameter group and its schedule.", when="now")
        keep = Remedy("Keep the weights in float32 and compute in bfloat16 by autocast.", when="restart")
        return Finding(
            f"Nothing is learning: {everything} have a gradient and do not change"
            if everything
            else f"{tensors} {have} a gradient and {do} not learn",
            "The learning rate of its parameter group is 0, or the update is lost in the rounding of the weights, as "
            "with bfloat16 weights and a small learning rate.",
            tuple(evidence),
            tuple(ruled_out),
            (keep, check) if rounded and not zero else (check, keep),
        )


class NoOptimizer(Failure):
    """A trainable tensor in no optimizer."""

    name = "tensor in no optimizer"
    family = "wiring"
    signals = ("wiring/owners",)

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.value > 1:
            return None
        tensors, _, _, have = _words(verdict)
        return Finding(
            f"{tensors} {have} no optimizer" + (" (the first of them)" if verdict.others else ""),
            "It asks for a gradient. In no optimizer it is never updated; in two it is updated twice a step.",
            remedies=_OWNERS,
        )


class SeveralOwners(Failure):
    """A tensor in more than one optimizer."""

    name = "tensor in several optimizers"
    family = "wiring"
    signals = ("wiring/owners",)

    def diagnose(self, case: Case) -> Finding | None:
        tensors, _, _, have = _words(case.verdict)
        first = " (the first of them)" if case.verdict.others else ""
        return Finding(
            f"{tensors} {have} {case.verdict.value:.0f} optimizers{first}",
            "It asks for a gradient. In no optimizer it is never updated; in two it is updated twice a step.",
            remedies=_OWNERS,
        )


class FrozenChanges(Failure):
    """What nothing trains has changed."""

    name = "frozen part changes"
    family = "wiring"
    signals = ("wiring/frozen_changed",)

    def diagnose(self, case: Case) -> Finding | None:
        tensors, s, _, _ = _words(case.verdict)
        if case.verdict.severity == "info":
            return Finding(
                f"{tensors} that nothing trains change{s}",
                "They are a copy of trained ones and change together, as those of a teacher or a target network do "
                "that follows its student.",
            )
        return Finding(
            f"{tensors} {'are' if case.verdict.others else 'is'} frozen and changed",
            "Something writes to it: an optimizer that still holds it and moves it by momentum or weight decay, an "
            "averaged copy, or code that loads weights.",
            remedies=(
                Remedy("Build the optimizer from parameters with requires_grad=True only.", when="restart"),
                Remedy("Look for in-place writes to it in hooks, callbacks and the forward pass.", when="now"),
            ),
        )


class RanksOutOfSync(Failure):
    """Ranks hold different values of what they should share."""

    name = "ranks out of sync"
    family = "wiring"
    signals = ("wiring/replicas_differ",)

    def diagnose(self, case: Case) -> Finding | None:
        tensors, s, _, _ = _words(case.verdict)
        if case.verdict.severity == "info":
            return Finding(
                f"{tensors} differ{s} between ranks from the start",
                "Right where ranks hold parts of one tensor (tensor or expert parallelism), a fault where they "
                "should hold copies: then they were initialised with different seeds.",
            )
        return Finding(
            f"Ranks hold different values of {tensors}",
            "Replicas have drifted apart: an update, a write or a skipped step on some ranks only, or gradients that "
            "were not averaged.",
            (f"{case.run.world_size} ranks",) if case.run.world_size > 1 else (),
            remedies=(
                Remedy(
                    "Stop and go back to a checkpoint: what ranks learn from here on is not one model.", when="now"
                ),
                Remedy(
                    "Look for writes to parameters that depend on the rank, and for parameters that "
                    "DistributedDataParallel was not given.",
                    when="restart",
                ),
            ),
        )


_OWNERS = (
    Remedy("Add it to exactly one optimizer.", when="restart"),
    Remedy("If it is not to be trained, set requires_grad=False: that saves its gradient.", when="restart"),
)


def _all_of_them(case: Case) -> str:
    """Words for all tensors that were looked at; empty where the verdict is about some of them."""
    verdict, seen = case.verdict, case.frame.readings.get(case.verdict.signal)
    if not verdict.others or seen is None or verdict.others + 1 < int(seen.seen.sum()):
        return ""
    return f"all {verdict.others + 1} tensors"


def _words(verdict: Verdict) -> tuple[str, str, str, str]:
    """The tensors, the ending of a verb, ``does`` and ``has``, for one or for several."""
    count = verdict.others + 1
    tensors = str(verdict.cell.coordinates[-1]) if count == 1 and verdict.cell.coordinates else f"{count} tensors"
    return (tensors, "s", "does", "has") if count == 1 else (tensors, "", "do", "have")
