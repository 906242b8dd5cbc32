"""NaN and infinity, and overflow of low precision."""

from __future__ import annotations

import math

import numpy as np

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.remedies import clip, go_back, lower_lr
from traindiag.record.run_info import RunInfo
from traindiag.rules.wording import names_of, number

FLOAT16_MAX = 65504.0
_CLOSE = 1 / 8
"""Share of float16's range from which the next step may well be outside of it."""

_LAST = ("loss/value", "gradient/norm", "gradient/norm_applied", "activation/max", "attention/max_logit")


class ScalerSearch(Failure):
    """The loss scaler of float16 looks for a scale: normal."""

    name = "loss scale search"
    family = "gradient"
    signals = ("*",)
    kinds = ("nonfinite",)

    def diagnose(self, case: Case) -> Finding | None:
        if case.verdict.severity != "info":
            return None
        return Finding(
            f"Gradients overflowed{case.at}",
            "The loss scaler of 16-mixed precision tries large scales and skips the steps that overflow: normal "
            "while it looks for one.",
        )


class LowPrecisionOverflow(Failure):
    """A number left the range of float16."""

    name = "low-precision overflow"
    family = "gradient"
    signals = ("*",)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        skipped = verdict.signal == "optimizer/skipped"
        half = run.precision is not None and run.precision.startswith("16")
        loss = case.frame.readings.get("loss/value")
        if (
            run.precision is None
            and math.isinf(verdict.value)
            and loss is not None
            and np.isfinite(loss.values).all()
        ):
            half = True  # float32 would have to pass 1e38 within one backward pass
        if not (verdict.kind == "nonfinite" and verdict.severity == "critical") and not skipped:
            return None
        largest = case.healthy("activation/max") or case.now("activation/max")
        close = largest is not None and largest.high >= _CLOSE * FLOAT16_MAX
        if not half or not (skipped or close or math.isinf(verdict.value) or case.by("optimizer/skipped")):
            return None  # a NaN alone has many causes
        evidence = _last_healthy(case) if not skipped else ()
        if run.precision is None:
            evidence += ("the loss is finite and the gradient infinite; the precision is not known",)
        ruled_out: tuple[str, ...] = ()
        if largest is not None:
            text = f"activation/max was {number(largest.high)} at {largest.high_at} (step {largest.step}); "
            text += f"float16 ends at {number(FLOAT16_MAX)}"
            if close:
                evidence += (text,)
            else:
                ruled_out = (f"activations out of range: {text}",)
        return Finding(
            f"Numbers leave the range of float16{case.at}" if not skipped else f"Updates are skipped{case.at}",
            "float16 ends at 65504: a large activation, logit or scaled gradient becomes infinite and the loss "
            "scaler skips the step. At a scale of 1 nothing is left to lower.",
            evidence,
            ruled_out,
            (
                *_wider(run),
                *([] if skipped else [go_back(verdict.step)]),
                *clip(run),
                *lower_lr(run),
            ),
        )


class SkippedUpdates(Failure):
    """Updates did not come although gradients were ready."""

    name = "skipped updates"
    family = "optimizer"
    signals = ("optimizer/skipped",)

    def diagnose(self, case: Case) -> Finding | None:
        return Finding(
            f"Updates are skipped{case.at}",
            "Gradients were ready and the optimizer made no step: a rule of the training code skips it, or an "
            "exception was caught.",
            ruled_out=(f"a loss scaler: precision is {case.run.precision}",) if case.run.precision else (),
            remedies=(Remedy("Look for what stands between backward() and step().", when="now"),),
        )


class NonFiniteValues(Failure):
    """Some number is NaN or infinite. Where it first was tells whether the forward or the backward pass made it."""

    name = "non-finite values"
    family = "gradient"
    signals = ("*",)
    kinds = ("nonfinite",)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        value = "NaN" if math.isnan(verdict.value) else "infinite"
        if verdict.severity == "warning":
            title = f"{verdict.signal} is {value}{case.at}"
            return Finding(title, "A number that the training code logs.", _last_healthy(case))
        what = {"gradient": "The gradient", "loss": "The loss"}.get(verdict.signal.split("/")[0], verdict.signal)
        where, ruled_out = _origin(case)
        if run.precision is not None and not run.precision.startswith("16"):
            ruled_out += (f"the range of float16: precision is {run.precision}",)
        before = tuple(f"{name} was open before" for name in case.diagnoses if name != self.name)
        return Finding(
            f"{what} is {value}{case.at}",
            "An overflow, a division by zero, a logarithm or root of a number not above zero, or a bad value in a "
            "batch.",
            (*where, *_last_healthy(case), *before),
            ruled_out,
            (
                go_back(verdict.step),
                Remedy(
                    "Repeat the step under torch.autograd.set_detect_anomaly(True), which names the operation.",
                    when="restart",
                ),
                *(_wider(run) if run.precision is not None else ()),
                *clip(run),
                *lower_lr(run),
            ),
        )


def _wider(run: RunInfo) -> list[Remedy]:
    if run.precision is not None and not run.precision.startswith("16"):
        return []
    instead = run.precision or "16-mixed"
    text = f"Use bf16-mixed instead of {instead}: float16 ends at 65504, bfloat16 has the range of float32."
    return [Remedy(text, {"precision": "bf16-mixed"}, "restart", "Kalamkar et al. 2019, arXiv 1905.12322")]


def _origin(case: Case) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where it began and what is excluded by that."""
    loss = case.frame.readings.get("loss/value")
    gradients = case.frame.readings.get("gradient/parameter_norm")
    layers = case.frame.readings.get("activation/nonfinite")
    where: list[str] = []
    if layers is not None:
        bad = [layers.cells.label(int(i)) for i in np.flatnonzero(layers.seen & (layers.values > 0))]
        if bad:
            where.append(f"the first block that returned such values is {bad[0]} of {names_of(bad)}")
    ruled_out: list[str] = []
    if loss is not None and loss.seen.any() and np.isfinite(loss.values[loss.seen]).all() and gradients is not None:
        ruled_out.append(f"the forward pass: the loss is {number(float(loss.values[loss.seen][0]))}")
        bad_tensors = np.flatnonzero(gradients.seen & ~np.isfinite(gradients.values))
        if 0 < bad_tensors.size < gradients.seen.sum():
            # gradients flow from the output to the input
            last = gradients.cells.coordinates[int(bad_tensors[-1])][-1]
            where.append(f"the backward pass met it first at {last}")
    return tuple(where), tuple(ruled_out)


def _last_healthy(case: Case) -> tuple[str, ...]:
    found = [(name, level) for name in _LAST if (level := case.healthy(name)) is not None]
    if not found:
        return ()
    told = ", ".join(f"{name} {number(level.high)} (step {level.step})" for name, level in found)
    return (f"last healthy: {told}",)
