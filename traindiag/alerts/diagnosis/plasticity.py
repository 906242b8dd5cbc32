"""Failures of critics: they cannot learn any more, or believe in values that there are not."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.wording import change_of, usual

_MA = "Ma et al. 2024, arXiv 2310.07418"
_SOKAR = "Sokar et al. 2023, arXiv 2302.12902"
_NIKISHIN = "Nikishin et al. 2022, arXiv 2205.07802"
_HASSELT = "van Hasselt et al. 2018, arXiv 1812.02648"
_CAUSES = "Lyle et al. 2024, arXiv 2402.18762"
_Q_RATIO = "plasticity/q_bound_ratio"

_EVIDENCE = (
    ("plasticity/fau_pooled", True),
    ("plasticity/dormant_025", False),
    ("plasticity/srank_99", True),
    ("plasticity/weight_norm_ratio", False),
    ("plasticity/preactivation_norm", False),
)
"""What goes with it, and whether the smallest cell speaks for all."""


class PlasticityKept(Failure):
    """Not a failure: active units stay at a healthy level."""

    name = "plasticity kept"
    family = "plasticity"
    signals = ("plasticity/fau_pooled",)
    kinds = ("stage",)

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        if verdict.limit is None or not verdict.value >= verdict.limit:
            return None
        return Finding(
            f"Active units stay at a healthy level{case.at}",
            "The fraction of active units has stopped changing and is near what it was at first: the network can "
            "take more updates on each sample than before.",
            change_of(case, "plasticity/fau_pooled", low=True),
            remedies=(
                Remedy(
                    "Raise the replay ratio from here on where more updates a step are wanted: from 0.5 to 2 in the "
                    "source.",
                    when="now",
                    source=f"{_MA} section 6",
                ),
            ),
        )


class LossOfPlasticity(Failure):
    """The network loses the ability to fit what is new."""

    name = "loss of plasticity"
    family = "plasticity"
    signals = (
        "plasticity/fau*",
        "plasticity/dead",
        "plasticity/zombie",
        "plasticity/dormant_*",
        "plasticity/saturation",
        "plasticity/srank_99",
        "plasticity/effective_rank",
        "plasticity/feature_rank",
        "plasticity/weight_norm_ratio",
        "plasticity/preactivation_norm",
        "plasticity/explained_variance",
        "plasticity/trainability",
    )

    def diagnose(self, case: Case) -> Finding | None:
        verdict = case.verdict
        note = verdict.severity == "info"
        evidence: tuple[str, ...] = ()
        for signal, low in _EVIDENCE:
            if signal not in verdict.evidence:
                evidence += change_of(case, signal, low=low)
        ruled_out = usual(f"values beyond any return: {_Q_RATIO}", case.now(_Q_RATIO), 1.0)
        return Finding(
            f"One sign of lost plasticity{case.at}" if note else f"The network is losing its plasticity{case.at}",
            "Targets that move with the network, and many updates on few data, leave units dead or linear, features "
            "of low rank and large weights, and such a network fits new targets worse. What is lost early does not "
            "come back by itself, and measures that prevent it do not undo it."
            + (" One sign alone is right in some environments and wrong in others." if note else ""),
            evidence,
            ruled_out,
            () if note else _REMEDIES,
        )


class SoftDivergence(Failure):
    """A critic that believes in returns which cannot be had."""

    name = "soft divergence of Q"
    family = "plasticity"
    signals = (_Q_RATIO, "plasticity/q_max_abs", "plasticity/q_mean", "plasticity/twin_gap")

    def diagnose(self, case: Case) -> Finding | None:
        evidence: tuple[str, ...] = ()
        for signal in ("plasticity/q_max_abs", "plasticity/q_mean", "plasticity/twin_gap"):
            if signal != case.verdict.signal:
                evidence += change_of(case, signal)
        return Finding(
            f"Values are larger than any return can be{case.at}"
            if case.verdict.signal == _Q_RATIO
            else f"Values of a critic are growing{case.at}",
            "Bootstrapping on a maximum over its own estimates lets a critic raise its own targets. Runs pass the "
            "bound and still learn; the further beyond, the worse they end. Large targets also drive units out of "
            "their range.",
            evidence,
            (),
            (
                Remedy(
                    "Choose and value the next action with different networks (double Q-learning), or take the "
                    "smaller of two critics.",
                    when="next run",
                    source=f"{_HASSELT}: less soft divergence with double Q",
                ),
                Remedy(
                    "Update the target network more slowly.",
                    when="restart",
                    source=f"{_HASSELT}: target networks reduce it",
                ),
                Remedy("Bootstrap over more steps (n-step returns).", when="next run", source=_HASSELT),
                Remedy(
                    "Normalise the critic's layers (LayerNorm) and bound rewards.",
                    when="next run",
                    source=f"{_CAUSES}: large targets are a cause of lost plasticity",
                ),
            ),
        )


_REMEDIES = (
    Remedy(
        "Lower the replay ratio: fewer updates for each step in the environment, at least until units are active "
        "again.",
        when="now",
        source=f"{_MA} section 6: at a ratio of 4 the critic's active units do not recover",
    ),
    Remedy(
        "Put LayerNorm before each activation of the critic, with weight decay.",
        when="next run",
        source=f"{_CAUSES}: the pair keeps pre-activations and weights in range",
    ),
    Remedy(
        "Reset the critic, its last layers at least, and its optimizer; keep the replay buffer.",
        when="now",
        source=f"{_NIKISHIN}: every 2e5 steps",
    ),
    Remedy(
        "Recycle dormant units (ReDo): draw incoming weights anew, set outgoing ones to zero, reset the optimizer's "
        "moments and step count for both.",
        when="now",
        source=f"{_SOKAR}: tau 0.025, every 1,000 updates",
    ),
)
