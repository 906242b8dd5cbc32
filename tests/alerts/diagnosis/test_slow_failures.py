"""Failures that grow over hundreds of steps: each told by its name, with the values of the run, and a near miss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.alerts.diagnosis.story import ADAMW, RUN, Story, changes, said
from traindiag.record.cells import Cell
from traindiag.rules.rule import Verdict

RANGE, NORM, ENTROPY = "attention/logit_range", "attention/query_norm", "attention/entropy"
HEAD = Cell(("layer", "head"), ("blocks.0", 1))


# -- attention -------------------------------------------------------------------------------------


def test_logits_norms_and_entropy_are_one_failure() -> None:
    story = Story()
    story.at(0, {RANGE: 5.0, NORM: 4.0, "attention/key_norm": 4.0, ENTROPY: 3.0})
    (first,) = story.at(
        100,
        {RANGE: 300.0, NORM: 40.0, "attention/key_norm": 35.0, ENTROPY: 0.2, "optimizer/update_ratio": 0.01},
        said(RANGE, "forecast", 300.0, 1e3, at=HEAD, steps_to_limit=(60.0, 80.0, 110.0)),
        said(NORM, "trend", 40.0, at=HEAD),
        said(ENTROPY, "spike", 0.2, 1.0, severity="info", at=HEAD),
    )
    assert (first.diagnosis, first.family, first.status) == ("attention-logit growth", "attention", "opened")
    assert first.title == "Attention logits will pass 1e3 in about 80 steps at blocks.0 head 1"
    assert "attention/query_norm was 4 at step 0 and is 40" in first.evidence
    assert "attention/entropy is 0.2 (spike) (step 100)" in first.evidence
    assert any("at most 0.01" in text for text in first.ruled_out)
    assert "Normalise queries" in first.remedies[0].text
    assert changes(first) == {"model.query_key_norm": True, "optimizer.lr": 0.03, "warmup": 200}


def test_where_updates_are_too_large_as_well_the_learning_rate_comes_first() -> None:
    story = Story()
    story.at(0, {RANGE: 5.0, "optimizer/update_ratio": [0.2, 0.2]})
    logits = said(RANGE, "threshold", 2e3, 1e3, at=HEAD)
    alerts = story.at(
        50, {RANGE: 2e3, "optimizer/update_ratio": [0.3, 0.3]},
        said("optimizer/update_ratio", "threshold", 0.3, 0.1), logits,
    )  # fmt: skip
    assert {a.diagnosis for a in alerts} == {"learning rate too high", "attention-logit growth"}
    attention = next(a for a in alerts if a.family == "attention")
    assert "learning rate" in attention.remedies[0].text


def test_norms_that_grow_with_quiet_logits_are_no_failure_of_attention() -> None:
    story = Story()
    story.at(0, {RANGE: 5.0, NORM: 4.0})
    (alert,) = story.at(100, {RANGE: 6.0, NORM: 40.0}, said(NORM, "trend", 40.0, at=HEAD))
    assert alert.diagnosis == ""
    (alert,) = story.at(110, {RANGE: 6.0, ENTROPY: 0.1}, said(ENTROPY, "spike", 0.1, 1.0, at=HEAD))
    assert alert.diagnosis == "attention entropy drop"


def test_a_raw_maximum_that_softmax_does_not_feel() -> None:
    raw = said("attention/max_logit", "threshold", 2e4, 1e4, at=HEAD)
    (alert,) = Story().at(100, {RANGE: 6.0, "attention/max_logit": 2e4}, raw)
    assert alert.diagnosis == "imprecise attention logits"
    assert "is at most 6" in alert.ruled_out[0]
    (alert,) = Story().at(100, {RANGE: 1.5e4, "attention/max_logit": 2e4}, raw)
    assert alert.diagnosis == "attention-logit growth"


def test_inherited_logits_are_told_apart_and_become_a_failure_when_they_grow() -> None:
    story = Story()
    held = said(RANGE, "threshold", 2000.0, 1e3, severity="info", at=HEAD)
    (note,) = story.at(0, {RANGE: 2000.0}, held)
    assert (note.diagnosis, note.severity) == ("inherited attention logits", "info")
    (alert,) = story.at(500, {RANGE: 3e4}, replace(held, value=3e4, limit=2e4, severity="warning"))
    assert (alert.diagnosis, alert.status, alert.id) == ("attention-logit growth", "escalated", note.id)


# -- output ----------------------------------------------------------------------------------------

DRIFT = said("output/log_z", "trend", 60.0, at=Cell(("site",), ("head",)))


def test_log_z_that_drifts_without_gain() -> None:
    story = Story()
    for step in range(0, 2000, 100):
        story.at(step, {"output/log_z": 5 + step / 40, "output/target_z_score": 3.0})
    (alert,) = story.at(2000, {"output/log_z": 60.0, "output/target_z_score": 3.05}, DRIFT)
    assert (alert.diagnosis, alert.family) == ("output-logit divergence", "output")
    assert "learning: output/target_z_score was 3 at step" in alert.ruled_out[0]
    assert changes(alert) == {"loss.z_loss": 1e-4, "optimizer.weight_decay": 1e-3, "optimizer.lr": 0.03}


def test_log_z_that_grows_with_what_is_learned() -> None:
    story = Story()
    for step in range(0, 2000, 100):
        story.at(step, {"output/log_z": 5 + step / 40, "output/target_z_score": 1 + step / 500})
    (alert,) = story.at(2000, {"output/log_z": 60.0, "output/target_z_score": 5.0}, DRIFT)
    assert alert.diagnosis == ""


def test_a_rule_that_has_looked_at_the_score_itself_is_believed() -> None:
    story = Story()
    for step in range(0, 2000, 100):
        story.at(step, {"output/target_z_score": 1 + step / 500})
    looked = replace(DRIFT, evidence="log Z is 60, while output/target_z_score gained 0.1%")
    (alert,) = story.at(2000, {"output/target_z_score": 5.0}, looked)
    assert alert.diagnosis == "output-logit divergence"


def test_decay_that_is_there_is_not_advised() -> None:
    decayed = replace(ADAMW, settings={**ADAMW.settings, "weight_decay": 0.1})
    (alert,) = Story(replace(RUN, optimizers=(decayed,))).at(9, {"output/log_z": 60.0}, DRIFT)
    assert "optimizer.weight_decay" not in changes(alert)


# -- optimizer -------------------------------------------------------------------------------------

TENSOR = Cell(("optimizer", "parameter"), ("adam", "blocks.0.mlp.weight"))
EPS = said("optimizer/grad_rms_over_eps", "threshold", 0.5, 1.0, at=TENSOR)


def test_epsilon_regime() -> None:
    story = Story()
    story.at(0, {"optimizer/grad_rms_over_eps": [1e4, 2e4]})
    (alert,) = story.at(900, {"optimizer/grad_rms_over_eps": [0.5, 3.0]}, EPS)
    assert (alert.diagnosis, alert.family) == ("epsilon regime", "optimizer")
    assert alert.remedies[0].text == "Lower eps of AdamW from 1e-8 to 1e-15."
    assert changes(alert) == {"optimizer.eps": 1e-15, "optimizer.lr": 0.03}
    assert "was 1e4 at step 0 and is 0.5" in alert.evidence
    assert "epsilon leaves 33% of its update" in alert.evidence


def test_a_gradient_well_above_epsilon_is_no_epsilon_regime() -> None:
    high = replace(EPS, value=50.0, limit=100.0)
    (alert,) = Story().at(9, {"optimizer/grad_rms_over_eps": 50.0}, high)
    assert alert.diagnosis == ""


def test_an_epsilon_that_is_small_already_is_not_lowered() -> None:
    small = replace(ADAMW, settings={**ADAMW.settings, "eps": 1e-15})
    (alert,) = Story(replace(RUN, optimizers=(small,))).at(9, {}, EPS)
    assert "optimizer.eps" not in changes(alert)


RATIO = said("optimizer/update_ratio", "threshold", 0.4, 0.1, at=TENSOR)


@pytest.mark.parametrize(
    ("ratio", "rate", "lower"),
    [(0.15, 0.1, 0.02), (0.06, 0.1, 0.03), (1.5, 0.1, 0.002), (0.3, 0.02, 0.002)],
)
def test_the_learning_rate_is_lowered_by_what_updates_ask_for(ratio: float, rate: float, lower: float) -> None:
    (alert,) = Story().at(40, {"optimizer/update_ratio": [ratio] * 3}, RATIO, rate=rate)
    assert (alert.diagnosis, alert.family) == ("learning rate too high", "optimizer")
    assert changes(alert)["optimizer.lr"] == lower
    assert f"its median over tensors is {ratio:g} (step 40)" in alert.evidence


def test_one_tensor_that_started_at_zero_is_no_matter_of_the_learning_rate() -> None:
    numbers = {"optimizer/update_ratio": [math.inf, 0.4, 0.001, 0.002, 0.001]}
    (alert,) = Story().at(1, numbers, RATIO)
    assert alert.diagnosis == "update out of proportion"
    assert "the median is 0.0015" in alert.ruled_out[0]
    low = replace(RATIO, value=1e-9, limit=1e-8)
    assert Story().at(1, {"optimizer/update_ratio": 1e-9}, low)[0].diagnosis == ""


def test_whatever_gives_way_under_a_raised_learning_rate_it_is_the_learning_rate() -> None:
    story = Story()
    for step in range(0, 400, 100):
        story.at(step, {"optimizer/update_ratio": [0.01, 0.02, 0.01]}, rate=0.1)
    grown = said("optimizer/update_ratio", "trend", 0.06, 0.03, at=TENSOR, others=2)
    dead = said("activation/zero_fraction", "threshold", 0.97, 0.9)
    (alert,) = story.at(400, {"optimizer/update_ratio": [0.03, 0.06, 0.03]}, dead, grown, rate=0.3)
    assert (alert.diagnosis, alert.family) == ("learning rate too high", "optimizer")
    assert "the learning rate is 0.3, the peak of its plan 0.1" in alert.evidence
    assert alert.remedies[0].text == "Bring the learning rate back from 0.3 to 0.1."
    assert changes(alert)["optimizer.lr"] == 0.1
    (kept,) = Story().at(400, {"optimizer/update_ratio": [0.03] * 3}, dead, rate=0.1)
    assert kept.diagnosis == "dead units"


def test_most_updates_that_grow_are_no_matter_of_one_tensor() -> None:
    grown = said("optimizer/update_ratio", "trend", 0.009, 0.003, at=TENSOR, others=1)
    (alert,) = Story().at(400, {"optimizer/update_ratio": [0.009, 0.009, 0.001]}, grown)
    assert alert.diagnosis == "learning rate too high"
    (alert,) = Story().at(400, {"optimizer/update_ratio": [0.009, 0.001, 0.001]}, replace(grown, others=0))
    assert alert.diagnosis == "update out of proportion"


# -- activations -----------------------------------------------------------------------------------

STREAM = said("activation/rms", "trend", 80.0, at=Cell(("layer",), ("blocks.7",)))


def test_a_stream_that_grows_in_time() -> None:
    story = Story()
    story.at(0, {"activation/rms": [1.0, 1.5], "activation/growth_exponent": 0.01})
    (alert,) = story.at(900, {"activation/rms": [70.0, 80.0], "activation/growth_exponent": 0.02}, STREAM)
    assert (alert.diagnosis, alert.family) == ("exploding residual stream", "activation")
    assert "growth over depth: its exponent is 0.02 (step 900)" in alert.ruled_out
    assert "learning rate" in alert.remedies[0].text
    assert changes(alert)["model.residual_init_std"] == 0.005


def test_a_stream_that_grows_over_depth_asks_for_another_initialisation() -> None:
    deep = said("activation/growth_exponent", "threshold", 0.3, 0.1)
    (alert,) = Story().at(0, {"activation/rms": [1.0, 9.0], "activation/growth_exponent": 0.3}, deep)
    assert alert.diagnosis == "exploding residual stream"
    assert "Initialise" in alert.remedies[0].text
    (alert,) = Story(replace(RUN, normalisation={})).at(0, {}, deep)
    assert alert.remedies[0].text.startswith("Normalise what enters")


def test_outliers_that_grow_in_a_quiet_stream() -> None:
    grows = said("activation/max", "trend", 900.0, at=Cell(("layer",), ("blocks.7",)))
    story = Story()
    story.at(0, {"activation/rms": 1.0, "activation/max": 10.0})
    (alert,) = story.at(900, {"activation/rms": 1.1, "activation/max": 900.0}, grows)
    assert alert.diagnosis == "outlier growth"
    story.at(1000, {"activation/rms": 0.5})
    (alert,) = story.at(1001, {"activation/rms": 0.5}, STREAM)
    assert alert.diagnosis == ""


DEAD = said("activation/zero_fraction", "threshold", 0.97, 0.9, at=Cell(("layer",), ("mlp.1",)))


def test_dead_units() -> None:
    story = Story()
    story.at(0, {"activation/zero_fraction": {"mlp.1": 0.5}})
    (alert,) = story.at(300, {"activation/zero_fraction": {"mlp.1": 0.97}}, DEAD)
    assert (alert.diagnosis, alert.family) == ("dead units", "activation")
    assert "was 0.5 at step 0 and is 0.97" in alert.evidence
    assert changes(alert)["optimizer.lr"] == 0.03
    (born,) = Story().at(0, {"activation/zero_fraction": {"mlp.1": 0.97}}, DEAD)
    assert "from the first sample on" in born.cause
    assert "Initialise" in born.remedies[0].text


def test_rows_of_tokens_that_were_not_met_are_not_dead() -> None:
    rows = Cell(("optimizer", "parameter"), ("adam", "token_embedding.weight"))
    zeros = said("gradient/zero_fraction", "threshold", 0.95, 0.7, at=rows)
    assert Story().at(9, {}, zeros)[0].diagnosis == ""
    half = replace(DEAD, value=0.45, limit=0.4)
    assert Story().at(9, {}, half)[0].diagnosis == ""


# -- gradients -------------------------------------------------------------------------------------

FADED = said("gradient/block_norm", "threshold", 1e-7, 1e-6, at=Cell(("optimizer", "block"), ("adam", "blocks.0")))


def test_gradients_that_vanish_over_depth() -> None:
    story = Story(replace(RUN, normalisation={}))
    story.at(0, {"loss/value": 2.3, "gradient/block_norm": {"blocks.0": 1e-3, "blocks.9": 1.0}})
    numbers = {"loss/value": 2.3, "gradient/block_norm": {"blocks.0": 1e-7, "blocks.9": 1.0}}
    (alert,) = story.at(99, numbers, FADED)
    assert (alert.diagnosis, alert.family) == ("vanishing gradients", "gradient")
    assert "lie between 1e-7 (adam blocks.0) and 1 (adam blocks.9) (step 99)" in alert.evidence
    assert "a loss that is solved: it is 2.3 (step 99)" in alert.ruled_out
    assert alert.remedies[0].text.startswith("Normalise")


def test_a_solved_loss_has_small_gradients() -> None:
    story = Story()
    story.at(0, {"loss/value": 2.3, "gradient/block_norm": [1.0, 1.0]})
    (alert,) = story.at(99, {"loss/value": 1e-3, "gradient/block_norm": [1e-7, 1e-6]}, FADED)
    assert alert.diagnosis == ""


def test_a_gradient_norm_that_grows_and_clipping_at_most_steps() -> None:
    story = Story(replace(RUN, clip=("norm", 1.0)))
    story.at(0, {"gradient/norm": 1.0})
    (alert,) = story.at(900, {"gradient/norm": 8.0}, said("gradient/norm", "trend", 8.0))
    assert (alert.diagnosis, "clip" in changes(alert)) == ("gradient-norm growth", False)
    (alert,) = story.at(910, {"gradient/norm": 8.0}, said("gradient/clip_rate", "threshold", 0.9, 0.5))
    assert alert.diagnosis == "clipped at most steps"
    assert changes(alert)["clip"] == 10.0


# -- wiring ----------------------------------------------------------------------------------------


def wired(signal: str, value: float = 1.0, **more: object) -> Verdict:
    return said(f"wiring/{signal}", "wiring", value, at=TENSOR, **more)  # type: ignore[arg-type]


def test_a_part_is_not_learning_or_nothing_is() -> None:
    part = Story().at(9, {"wiring/unchanged": [1.0, 0.0, 0.0]}, wired("unchanged"))[0]
    assert part.title == "blocks.0.mlp.weight has a gradient and does not learn"
    assert (part.diagnosis, part.family) == ("not learning", "wiring")
    assert "a schedule that has ended: the learning rate is 0.1" in part.ruled_out
    whole = Story().at(9, {"wiring/unchanged": [1.0, 1.0]}, wired("unchanged", others=1), rate=0.0)[0]
    assert whole.title == "Nothing is learning: all 2 tensors have a gradient and do not change"
    assert "the learning rate is 0" in whole.evidence
    low = Story(replace(RUN, precision="bf16-true")).at(9, {}, wired("unchanged"))[0]
    assert "float32" in low.remedies[0].text


@pytest.mark.parametrize(
    ("verdict", "name"),
    [
        (wired("ungraded"), "no gradient"),
        (wired("owners", 0.0), "tensor in no optimizer"),
        (wired("owners", 2.0), "tensor in several optimizers"),
        (wired("frozen_changed"), "frozen part changes"),
        (wired("replicas_differ"), "ranks out of sync"),
        (said("gradient/rms", "wiring", 0.0, severity="info", at=TENSOR), "structural zeros"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_faults_of_wiring_have_a_name_each(verdict: Verdict, name: str) -> None:
    (alert,) = Story().at(9, {}, verdict)
    assert (alert.diagnosis, alert.family) == (name, "wiring")
    assert alert.remedies
