"""All failures, and the choice between them."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.activation import DeadUnits, ExplodingResidualStream, OutlierGrowth
from traindiag.alerts.diagnosis.attention import (
    AttentionLogitGrowth,
    ImpreciseLogits,
    InheritedLogits,
    SharpenedAttention,
)
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.gradient import (
    AlwaysClipped,
    CorruptBatch,
    GradientGrowth,
    GradientJump,
    LossSpike,
    VanishingGradients,
)
from traindiag.alerts.diagnosis.nonfinite import LowPrecisionOverflow, NonFiniteValues, ScalerSearch, SkippedUpdates
from traindiag.alerts.diagnosis.optimizer import (
    EpsilonRegime,
    LearningRateRaised,
    LearningRateTooHigh,
    OutOfProportion,
    StaleSecondMoment,
)
from traindiag.alerts.diagnosis.output import OutputLogitDivergence
from traindiag.alerts.diagnosis.plasticity import LossOfPlasticity, PlasticityKept, SoftDivergence
from traindiag.alerts.diagnosis.resume import LostOptimizerState
from traindiag.alerts.diagnosis.stability import Forgetting, StabilityGap
from traindiag.alerts.diagnosis.wiring import (
    FrozenChanges,
    NoGradient,
    NoOptimizer,
    NotLearning,
    RanksOutOfSync,
    SeveralOwners,
    StructuralZeros,
)
from traindiag.record.catalogue import BY_NAME

FAILURES: tuple[Failure, ...] = (
    LostOptimizerState(),
    ScalerSearch(),
    LowPrecisionOverflow(),
    NonFiniteValues(),
    SkippedUpdates(),
    StabilityGap(),
    Forgetting(),
    InheritedLogits(),
    LearningRateRaised(),
    AttentionLogitGrowth(),
    ImpreciseLogits(),
    SharpenedAttention(),
    OutputLogitDivergence(),
    EpsilonRegime(),
    StaleSecondMoment(),
    CorruptBatch(),
    PlasticityKept(),
    LossOfPlasticity(),
    SoftDivergence(),
    LearningRateTooHigh(),
    OutOfProportion(),
    ExplodingResidualStream(),
    OutlierGrowth(),
    DeadUnits(),
    StructuralZeros(),
    NoGradient(),
    NotLearning(),
    NoOptimizer(),
    SeveralOwners(),
    FrozenChanges(),
    RanksOutOfSync(),
    GradientJump(),
    AlwaysClipped(),
    VanishingGradients(),
    GradientGrowth(),
    LossSpike(),
)
"""The most specific first: of two that match, the first one is told."""


def diagnose(case: Case) -> tuple[Failure | None, Finding]:
    """The most specific failure that the numbers allow; None with general words where there is none.

    Example:
        >>> from traindiag.alerts.diagnosis.memory import Memory
        >>> from traindiag.record.frame import Frame
        >>> from traindiag.record.run_info import OptimizerInfo, RunInfo
        >>> from traindiag.rules.rule import Verdict
        >>> run = RunInfo(optimizers=(OptimizerInfo("adam", "AdamW", {"eps": 1e-8}),))
        >>> low = Verdict("eps", "threshold", "optimizer/grad_rms_over_eps", 40, value=0.5, limit=1.0)
        >>> failure, finding = diagnose(Case(low, Frame(40, "slow", {}, run), Memory()))
        >>> failure.name, finding.remedies[0].text
        ('epsilon regime', 'Lower eps of AdamW from 1e-8 to 1e-15.')
    """
    for failure in FAILURES:
        if failure.explains(case.verdict):
            finding = failure.diagnose(case)
            if finding is not None:
                return failure, finding
    return None, _in_general(case)


def _in_general(case: Case) -> Finding:
    verdict = case.verdict
    signal = BY_NAME.get(verdict.signal)
    found = {
        "spike": "jumped",
        "forecast": "is on its way to its limit",
        "trend": "is drifting",
        "shift": "has left its level",
    }.get(verdict.kind, "is beyond its limit")
    return Finding(
        f"{verdict.signal} {found}{case.at}",
        f"{signal.summary}; {signal.source}" if signal is not None and signal.source else "",
        remedies=(
            Remedy(
                f"Look at {verdict.signal} around step {verdict.step}, beside the loss and the learning rate; keep a "
                "checkpoint from before.",
                when="now",
            ),
        ),
    )
