"""Failures of what blocks return."""

from __future__ import annotations

import math

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.remedies import OLMO2, clip, longer_warmup, lower_lr
from traindiag.alerts.diagnosis.wording import change_of
from traindiag.rules.wording import number

_RMS, _MAX, _DEPTH = "activation/rms", "activation/max", "activation/growth_exponent"
_ZEROS = ("activation/zero_fraction", "gradient/zero_fraction")

FLAT = 0.05
"""Growth exponent over depth below which depth is not to blame: runs of OLMo 2 without spikes lie near -0.03, those
with spikes at 0.09 to 0.12 (arXiv 2501.00656 section 3)."""

GROWN = 1.5
"""Growth since the first sample below which a stream does not explode; weights finding their size change it more."""

INIT = 0.02
"""Standard deviation of GPT-2's weights, which those that write to the residual stream divide by the square root of
their number."""

DEAD = 0.5
"""Share of zeros from which units are dead and not just off: half of a rectifier's units are off by chance."""

BORN = 0.9
"""Share of the present zeros that were there at the first sample where units were never alive."""


class ExplodingResidualStream(Failure):
    """What blocks return grows, over depth or over time."""

    name = "exploding residual stream"
    family = "activation"
    signals = (_RMS, _DEPTH, _MAX)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        grown, held = case.grown(_RMS), verdict.limit is not None and verdict.value >= verdict.limit
        if verdict.signal != _DEPTH and grown is not None and grown < GROWN and (verdict.signal == _MAX or not held):
            return None
        if verdict.signal == _DEPTH and verdict.limit is not None and verdict.value < verdict.limit:
            return None  # a stream that fades
        evidence = change_of(case, _RMS) if verdict.signal != _RMS or verdict.kind != "threshold" else ()
        ruled_out: tuple[str, ...] = ()
        depth = case.now(_DEPTH)
        in_depth = verdict.signal == _DEPTH
        if depth is not None and verdict.signal != _DEPTH:
            if depth.high < FLAT:
                ruled_out = (f"growth over depth: its exponent is {number(depth.high)} (step {depth.step})",)
            else:
                in_depth = True
                evidence += (f"it grows over depth with exponent {number(depth.high)} (step {depth.step})",)
        layers = sum(n for kind, n in run.normalisation.items() if kind != "query_key")
        if layers:
            ruled_out += (f"missing normalisation: this model has {layers} such layers",)
        remedies = []
        if run.depth:
            smaller = float(f"{INIT / math.sqrt(2 * run.depth):.1e}")
            remedies.append(
                Remedy(
                    f"Initialise the projections that write to the residual stream with a standard deviation of "
                    f"{smaller:g} ({INIT:g} over the square root of {2 * run.depth} of them).",
                    {"model.residual_init_std": smaller},
                    "next run",
                    "Radford et al. 2019 (GPT-2) section 2.3",
                )
            )
        if not layers:
            text = "Normalise what enters each block (LayerNorm or RMSNorm)."
            remedies.insert(0, Remedy(text, {}, "next run", "Xiong et al. 2020, arXiv 2002.04745"))
        else:
            text = "Normalise what attention and MLP return, before it is added to the stream."
            remedies.append(Remedy(text, {}, "next run", f"{OLMO2} section 3.3: reordered norm"))
        slower = lower_lr(
            run, source="Wortsman et al. 2023, arXiv 2309.14322 section 3.4: block outputs grow with it"
        )
        # growth over depth is there at the start and asks for an initialisation; growth over time for smaller steps
        remedies = [*remedies, *slower] if in_depth else [*slower, *remedies]
        return Finding(
            f"The residual stream is growing{case.at}",
            "Blocks add more to the stream than was there, block after block or step after step. The gradient that "
            "passes the final normalisation shrinks as it grows, and low precision overflows in the end.",
            evidence,
            ruled_out,
            (*remedies, *longer_warmup(run), *clip(run)),
        )


class OutlierGrowth(Failure):
    """Single features grow while the stream as a whole does not."""

    name = "outlier growth"
    family = "activation"
    signals = (_MAX, "activation/kurtosis")

    def diagnose(self, case: Case) -> Finding | None:
        grown = case.grown(_RMS)
        if grown is None or grown >= GROWN:
            return None
        return Finding(
            f"Single features are growing{case.at}",
            "A few features carry very large values, as in many trained models. They are harmless to training in "
            "bfloat16 and make quantisation hard; that they keep growing is not usual.",
            change_of(case, _MAX),
            (f"growth of the stream as a whole: its RMS is {grown:.3g} times its first",),
            (
                Remedy(
                    "Keep the largest activation in sight where float16 is used: it ends at 65504.",
                    when="now",
                    source="Sun et al. 2024, arXiv 2402.17762",
                ),
                *lower_lr(case.run, source="He et al. 2024, arXiv 2405.19279: fewer outliers at lower rates"),
            ),
        )


class DeadUnits(Failure):
    """Units that return zero whatever comes in, or get no gradient."""

    name = "dead units"
    family = "activation"
    signals = _ZEROS

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.kind == "threshold" and not verdict.value >= DEAD:
            return None
        if verdict.signal == _ZEROS[1] and "embed" in str(verdict.cell).lower():
            return None  # rows of tokens that were not in the batch
        first = case.memory.first(verdict.signal)
        born = first is not None and first.high_at == str(verdict.cell) and first.high >= BORN * verdict.value
        update = case.now("optimizer/update_ratio")
        ruled_out: tuple[str, ...] = ()
        if update is not None and update.high < 0.1:
            ruled_out = (f"updates that throw units off: at most {number(update.high)} of the weights",)
        kinder = Remedy(
            "Use an activation with a slope everywhere: GELU, SiLU or LeakyReLU in the place of ReLU.",
            when="next run",
            source="Maas et al. 2013 (leaky rectifiers)",
        )
        start = Remedy(
            "Initialise weights before a rectifier with variance 2 / fan-in and biases with 0.",
            when="next run",
            source="He et al. 2015, arXiv 1502.01852",
        )
        slower = lower_lr(case.run, source="a large update throws a rectifier's bias below all of its inputs")
        return Finding(
            f"Units are dead{case.at}",
            "Where a rectifier's input is negative for every sample, its output and its gradient are zero and it "
            + ("cannot come back: so it has been from the first sample on." if born else "cannot come back."),
            () if born else change_of(case, verdict.signal),
            ruled_out,
            (start, kinder, *slower) if born else (*slower, *longer_warmup(case.run), kinder, start),
        )
