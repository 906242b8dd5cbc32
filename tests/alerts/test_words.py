"""Remedies carry the values of this run, and nothing that it already does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.rules.frames import frame, reading
from traindiag.alerts.diagnosis.failure import Case, Finding
from traindiag.alerts.diagnosis.failures import diagnose
from traindiag.alerts.diagnosis.memory import Memory
from traindiag.record.cells import Cell
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.alive import StructuralZeros
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import Rule, Verdict

RUN = RunInfo(
    "r", optimizers=(OptimizerInfo("adam", "AdamW", {"lr": 0.001, "betas": [0.9, 0.999]}, peak_lr=0.1),),
    length=4000, warmup=20, precision="16-mixed",
)  # fmt: skip
LOGITS = Verdict("l", "threshold", "attention/logit_range", 50, value=2e3, limit=1e3,
                 cell=Cell(("layer", "head"), ("blocks.0", 1)))  # fmt: skip


def told(verdict: Verdict, run: RunInfo) -> Finding:
    return diagnose(Case(verdict, frame(verdict.step, run=run), Memory()))[1]


def changes(explanation: Finding) -> dict[str, object]:
    return {k: v for r in explanation.remedies for k, v in r.change.items()}


def test_logit_growth_has_the_values_of_the_run() -> None:
    said = told(LOGITS, RUN)
    assert changes(said) == {"model.query_key_norm": True, "optimizer.lr": 0.03, "warmup": 200}
    text = " ".join(r.text for r in said.remedies)
    assert "from 0.1 to 0.03" in text
    assert "200 steps instead of 20" in text
    assert "Normalise queries and keys" in said.remedies[0].text
    assert all(r.source for r in said.remedies)


def test_what_the_model_has_is_not_advised_but_ruled_out() -> None:
    said = told(LOGITS, replace(RUN, normalisation={"LayerNorm": 13, "query_key": 6}))
    assert not any("Normalise queries" in r.text for r in said.remedies)
    assert any("6 such layers" in text for text in said.ruled_out)
    assert any(
        "Normalise queries" in r.text for r in told(LOGITS, replace(RUN, normalisation={"RMSNorm": 16})).remedies
    )


def test_what_is_unknown_is_not_made_up() -> None:
    said = told(LOGITS, RunInfo())
    assert changes(said) == {"model.query_key_norm": True}
    assert any("5% of the run" in r.text for r in said.remedies)


def test_two_optimizers_are_named() -> None:
    two = (OptimizerInfo("actor", "Adam", {"lr": 3e-4}), OptimizerInfo("critic", "Adam", {"lr": 1e-3}))
    assert changes(told(LOGITS, RunInfo(optimizers=two))) == {
        "model.query_key_norm": True, "optimizer.actor.lr": 9e-5, "optimizer.critic.lr": 3e-4,
    }  # fmt: skip


def test_a_forecast_says_when() -> None:
    said = told(replace(LOGITS, kind="forecast", steps_to_limit=(60.0, 80.0, 110.0)), RUN)
    assert said.title == "Attention logits will pass 1e3 in about 80 steps at blocks.0 head 1"


def test_a_gradient_spike() -> None:
    spike = Verdict("s", "spike", "gradient/norm", 50, severity="info", value=30.0, limit=4.0)
    assert changes(told(spike, RUN)) == {"clip": 1.0, "optimizer.betas": [0.9, 0.95]}
    clipped = told(spike, replace(RUN, clip=("norm", 0.5)))
    assert "clip" not in changes(clipped)
    assert "clipped at 0.5" in clipped.ruled_out[0]


def test_non_finite() -> None:
    bad = Verdict("n", "nonfinite", "gradient/parameter_norm", 50, severity="critical", value=math.nan)
    said = told(bad, RUN)
    assert said.title == "The gradient is NaN"
    assert changes(said)["precision"] == "bf16-mixed"
    assert "before step 50" in said.remedies[0].text
    assert "precision" not in changes(told(bad, replace(RUN, precision="bf16-mixed")))
    assert not told(replace(bad, severity="info"), RUN).remedies


KINDS = {
    "Growth": "trend",
    "OutputDrift": "trend",
    "StaleSecondMoment": "threshold",
    "Vanishing": "threshold",
    "LossSurge": "spike",
    "TaskGap": "gap",
}
"""Of rules whose verdicts have a kind that is not their own name."""

SIGNALS = {"TaskGap": "stability/gap_depth"}
"""Of rules whose verdicts are about another signal than the first one that they read."""


@pytest.mark.parametrize("rule", default_rules(), ids=lambda r: r.name)
def test_every_default_rule_is_explained(rule: Rule) -> None:
    name = type(rule).__name__
    kind = "wiring" if isinstance(rule, StructuralZeros) else KINDS.get(name, name.lower())
    signal = SIGNALS.get(name, next(iter(rule.signals), "loss/value"))
    limit = 2.0 if name == "Vanishing" else None
    severity = rule.settings().get("severity", "critical")
    memory = Memory()
    for step, size in ((0, 5.0), (8, 50.0)):  # norms of queries and keys are told with the logits that they make
        memory.take(frame(step, reading([size], "attention/logit_range")), [])
    case = Case(
        Verdict(rule.name, kind, signal, 9, severity=severity, value=1.0, limit=limit), frame(9, run=RUN), memory
    )
    failure, said = diagnose(case)
    assert failure is not None
    assert said.cause
    assert said.remedies
    assert signal not in said.title  # not the words for just any signal


def test_a_rule_of_the_users_own() -> None:
    said = told(
        Verdict("mine", "threshold", "reward/kl", 9, value=30.0, limit=10.0, cell=Cell(("place",), ("b",))), RUN
    )
    assert said.title == "reward/kl is beyond its limit at b"
    assert "reward/kl" in said.remedies[0].text
    assert said.cause == ""
