"""Failures that leave a few steps, or none: what each is told as, what excludes it, and what goes with it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.alerts.diagnosis.story import ADAMW, RUN, Story, changes, over, said
from traindiag.alerts.alert import Alert
from traindiag.record.cells import Cell

LOSS, NORM, MOMENT = "loss/value", "gradient/norm", "optimizer/sentinel_rms_t"
EMBEDDING = Cell(("optimizer", "parameter"), ("adam", "embedding.weight"))
CALM = {LOSS: 2.0, NORM: 1.0, MOMENT: [1.01, 0.98], "gradient/parameter_norm": {"embedding": 0.6, "head": 0.8}}

spike = said(LOSS, "spike", 9.0, 4.0, severity="info")
jump = said(NORM, "spike", 30.0, 4.0, severity="info")
behind = said(MOMENT, "threshold", 4.0, 2.3, at=EMBEDDING)


def after_calm(steps: int = 40) -> Story:
    story = Story()
    story.calm(steps, CALM)
    return story


# -- corrupt batch ---------------------------------------------------------------------------------


def test_loss_and_gradient_that_jump_in_one_step_came_with_the_batch() -> None:
    story = after_calm()
    numbers = {**CALM, LOSS: 9.0, NORM: 30.0, "gradient/parameter_norm": {"embedding": 29.0, "head": 7.7}}
    (alert,) = story.at(40, numbers, jump, spike, lane="fast")
    assert (alert.diagnosis, alert.family) == ("corrupt batch", "loss")
    assert (alert.status, alert.severity) == ("opened", "warning")  # two witnesses
    assert "loss/value is 9 (spike) (step 40)" in alert.evidence
    assert "adam embedding has 93% of it, more than all others" in alert.evidence
    assert "a stale second moment: RMS_t before was at most 1.01 at" in alert.ruled_out[0]
    assert "(step 39)" in alert.ruled_out[0]
    assert alert.remedies[0].text.startswith("Look at the samples of step 40")
    assert changes(alert) == {"clip": 1.0}


def test_noise_around_a_loss_that_is_solved_is_no_corrupt_batch() -> None:
    story = Story()
    story.at(0, {**CALM, LOSS: 2.3}, lane="fast")
    for step in range(1, 40):
        story.at(step, {**CALM, LOSS: 0.001, NORM: 0.01}, lane="fast")
    spiked = replace(spike, value=0.08, limit=0.004)
    alerts = story.at(40, {**CALM, LOSS: 0.08, NORM: 1.0}, jump, spiked, lane="fast")
    assert {(a.diagnosis, a.severity) for a in alerts} == {("gradient-norm jump", "info")}


def test_a_second_moment_that_is_left_behind_by_the_same_batch_is_its_witness() -> None:
    (alert,) = after_calm().at(40, {LOSS: 9.0, NORM: 30.0, MOMENT: 4.0}, jump, behind, spike, lane="fast")
    assert alert.diagnosis == "corrupt batch"


def test_where_something_was_wrong_before_the_batch_is_not_to_blame() -> None:
    story = after_calm()
    story.at(38, CALM, behind, lane="fast")
    alerts = story.at(40, {**CALM, LOSS: 9.0, NORM: 30.0}, jump, spike, lane="fast")
    assert all(a.diagnosis != "corrupt batch" for a in [*alerts, *story.book.alerts])


def test_a_run_that_was_failing_before_is_not_the_fault_of_a_batch_and_a_frozen_part_is_no_failing_run() -> None:
    numbers = {**CALM, LOSS: 9.0, NORM: 30.0}
    logits = said("attention/logit_range", "threshold", 2e3, 1e3)
    story = after_calm()
    story.at(30, {}, logits)
    assert [a.diagnosis for a in story.at(40, numbers, jump, spike, lane="fast")] == ["gradient-norm jump"]
    story = after_calm()
    story.at(30, {}, said("wiring/unchanged", "wiring", 1.0, at=EMBEDDING))
    assert [a.diagnosis for a in story.at(40, numbers, jump, spike, lane="fast")] == ["corrupt batch"]


# -- stale second moment ---------------------------------------------------------------------------


def test_a_second_moment_that_is_behind_before_the_loss_jumps() -> None:
    story = after_calm()
    (first,) = story.at(40, {**CALM, MOMENT: [4.0, 1.0]}, behind, lane="fast")
    assert (first.diagnosis, first.family) == ("stale second moment", "optimizer")
    assert first.title.endswith("at adam embedding.weight")
    assert "at most 31.6 is possible at beta2 0.999" in first.evidence
    assert "a bad batch: the loss is 2 as before (step 40)" in first.ruled_out
    assert changes(first) == {"optimizer.betas": [0.9, 0.95], "clip": 1.0, "optimizer.lr": 0.03}
    assert first.remedies[0].text.startswith("Lower beta2 of AdamW from 0.999 to 0.95")
    assert story.at(43, {**CALM, LOSS: 9.0, NORM: 30.0}, jump, spike, behind, lane="fast") == []  # witnesses


def test_a_short_memory_is_not_shortened() -> None:
    quick = replace(ADAMW, settings={**ADAMW.settings, "betas": [0.9, 0.95]})
    (alert,) = Story(replace(RUN, optimizers=(quick,))).at(9, CALM, behind, lane="fast")
    assert "optimizer.betas" not in changes(alert)
    assert "StableAdamW" in alert.remedies[0].text


# -- gradient-norm jump and its witnesses ----------------------------------------------------------


def test_a_jump_alone_is_a_note() -> None:
    (alert,) = after_calm().at(40, {**CALM, NORM: 30.0}, jump, lane="fast")
    assert (alert.diagnosis, alert.severity) == ("gradient-norm jump", "info")
    assert alert.bundle == {}
    (clipped,) = Story(replace(RUN, clip=("norm", 0.5))).at(40, {}, jump, lane="fast")
    assert "clip" not in changes(clipped)
    assert "clipped at 0.5" in clipped.ruled_out[0]


def test_the_loss_makes_a_warning_of_it() -> None:
    story = after_calm()
    (note,) = story.at(40, {**CALM, NORM: 30.0}, jump, lane="fast")
    assert story.at(41, CALM, over(jump), lane="fast") == []
    (alert,) = story.at(43, {**CALM, LOSS: 9.0}, spike, lane="fast")
    assert (alert.status, alert.severity, alert.id) == ("escalated", "warning", note.id)
    assert "gradient/norm is 30 (spike) (step 40)" in alert.evidence
    assert alert.bundle["steps"][-1] == 43


def test_a_jump_that_comes_again_counts_from_then() -> None:
    story = after_calm()
    for step in (40, 70):
        story.at(step, {**CALM, NORM: 30.0}, jump, lane="fast")
        story.at(step + 1, CALM, over(jump), lane="fast")
    (alert,) = story.at(73, {**CALM, LOSS: 9.0}, spike, lane="fast")
    assert (alert.status, alert.severity) == ("escalated", "warning")


def test_a_loss_that_jumps_much_later_is_another_event() -> None:
    story = after_calm()
    story.at(40, {**CALM, NORM: 30.0}, jump, lane="fast")
    story.at(41, CALM, over(jump), lane="fast")
    (alert,) = story.at(60, {**CALM, LOSS: 9.0}, spike, lane="fast")
    assert (alert.diagnosis, alert.status, alert.severity) == ("loss spike", "opened", "info")


@pytest.mark.parametrize(("step", "severity"), [(39, "warning"), (40, "info")])
def test_a_second_moment_speaks_for_itself_only_where_it_was_behind_before(step: int, severity: str) -> None:
    story, noted = after_calm(), replace(behind, severity="info")
    if step < 40:
        story.at(step, CALM, noted, lane="fast")
    story.at(40, {**CALM, NORM: 30.0}, jump, noted, lane="fast")
    assert story.book.alerts[-1].severity == severity
    assert len({a.id for a in story.book.alerts}) == 1


# -- non-finite ------------------------------------------------------------------------------------

BAD = said("gradient/parameter_norm", "nonfinite", math.nan, severity="critical", at=EMBEDDING)


def test_non_finite_gradients_name_the_tensor_and_the_last_healthy_values() -> None:
    story = after_calm()
    numbers = {
        LOSS: 2.0,
        NORM: math.nan,
        "gradient/parameter_norm": {"embedding": math.nan, "a": math.nan, "head": 1.0},
    }
    (alert,) = story.at(40, numbers, BAD, lane="fast")
    assert (alert.diagnosis, alert.severity) == ("non-finite values", "critical")
    assert alert.title == "The gradient is NaN at adam embedding.weight"
    assert "the backward pass met it first at a" in alert.evidence
    assert "last healthy: loss/value 2 (step 39), gradient/norm 1 (step 39)" in alert.evidence
    assert "the forward pass: the loss is 2" in alert.ruled_out
    assert any("32-true" in text for text in alert.ruled_out)
    assert "before step 40" in alert.remedies[0].text
    assert [t["parameter"] for t in alert.bundle["tensors"]] == ["adam embedding", "adam a"]
    assert alert.bundle["tensors"][0]["before"] == pytest.approx(0.6)


def test_a_forward_pass_that_breaks_names_its_first_block() -> None:
    numbers = {LOSS: math.nan, "activation/nonfinite": {"blocks.0": 0.0, "blocks.1": 3.0, "blocks.2": 9.0}}
    (alert,) = Story().at(40, numbers, replace(BAD, signal=LOSS), lane="slow")
    assert "the first block that returned such values is blocks.1 of blocks.1, blocks.2" in alert.evidence
    assert not any("forward pass" in text for text in alert.ruled_out)


def test_what_was_open_before_is_told() -> None:
    story = Story()
    story.at(9, {"attention/logit_range": 2e4}, said("attention/logit_range", "threshold", 2e4, 1e3))
    (alert,) = story.at(10, {LOSS: math.nan}, BAD)
    assert "attention-logit growth was open before" in alert.evidence


HALF = replace(RUN, precision="16-mixed")


def test_float16_overflow() -> None:
    story = Story(HALF)
    story.at(30, {"activation/max": 40_000.0})
    (alert,) = story.at(40, {LOSS: 2.0, NORM: math.nan}, BAD, lane="fast")
    assert alert.diagnosis == "low-precision overflow"
    assert "activation/max was 4e4" in alert.evidence
    assert changes(alert)["precision"] == "bf16-mixed"
    infinite = Story(HALF)
    infinite.at(30, {"activation/max": 40.0})
    (alert,) = infinite.at(40, {NORM: math.inf}, replace(BAD, value=math.inf), lane="fast")
    assert alert.diagnosis == "low-precision overflow"
    assert "activations out of range: activation/max was 40" in alert.ruled_out[0]


def test_an_infinite_gradient_of_a_finite_loss_where_the_precision_is_not_known() -> None:
    infinite = replace(BAD, value=math.inf)
    (alert,) = Story(replace(RUN, precision=None)).at(40, {LOSS: 2.0, NORM: math.inf}, infinite, lane="fast")
    assert alert.diagnosis == "low-precision overflow"
    (alert,) = Story(replace(RUN, precision=None)).at(40, {LOSS: math.nan, NORM: math.inf}, infinite, lane="fast")
    assert alert.diagnosis == "non-finite values"
    assert "precision" not in changes(alert)


def test_a_nan_without_large_numbers_is_no_overflow() -> None:
    story = Story(HALF)
    story.at(30, {"activation/max": 40.0})
    assert story.at(40, {NORM: math.nan}, BAD, lane="fast")[0].diagnosis == "non-finite values"
    assert Story(replace(RUN, precision="bf16-mixed")).at(
        40, {NORM: math.inf}, replace(BAD, value=math.inf), lane="fast"
    )[0].diagnosis == "non-finite values"  # fmt: skip


def test_skipped_updates() -> None:
    skipped = said("optimizer/skipped", "threshold", 1.0, 0.5)
    assert Story(HALF).at(9, {}, skipped, lane="fast")[0].diagnosis == "low-precision overflow"
    (alert,) = Story().at(9, {}, skipped, lane="fast")
    assert (alert.diagnosis, alert.ruled_out) == ("skipped updates", ("a loss scaler: precision is 32-true",))


# -- resumed without optimizer state ---------------------------------------------------------------


def test_what_follows_a_lost_state_is_laid_to_it() -> None:
    lost = said(MOMENT, "wiring", 1.0, at=EMBEDDING)
    story = after_calm()
    (first,) = story.at(40, CALM, lost, lane="fast", segment=1)
    assert (first.diagnosis, first.family) == ("resumed without optimizer state", "wiring")
    assert "state_dict" in first.remedies[0].text
    assert story.at(45, {**CALM, LOSS: 9.0, NORM: 30.0}, lost, jump, spike, lane="fast", segment=1) == []
    same_step = after_calm().at(40, {**CALM, LOSS: 9.0, NORM: 30.0}, lost, jump, spike, lane="fast", segment=1)
    assert [a.diagnosis for a in same_step] == ["resumed without optimizer state"]


# -- the bundle ------------------------------------------------------------------------------------


def test_a_bundle_shows_the_last_steps_and_which_tensors_jumped_once() -> None:
    story = after_calm(100)
    numbers = {LOSS: 9.0, NORM: 5.0, "gradient/parameter_norm": {"embedding": 3.0, "head": 4.0, "new": 0.5}}
    (alert,) = story.at(100, numbers, jump, spike, lane="fast")
    assert alert.bundle["steps"] == list(range(69, 101))
    assert alert.bundle[LOSS] == [2.0] * 31 + [9.0]
    tensors = alert.bundle["tensors"]
    assert [t["parameter"] for t in tensors] == ["adam head", "adam embedding", "adam new"]
    assert tensors[0]["share"] == pytest.approx((16 - 0.64) / (16 - 0.64 + 9 - 0.36 + 0.25))
    assert [t["before"] for t in tensors] == pytest.approx([0.8, 0.6, None])
    (worse,) = story.at(101, numbers, replace(jump, severity="critical"), lane="fast")
    assert (worse.status, worse.bundle) == ("escalated", {})


def test_a_bundle_is_bounded_and_survives_json() -> None:
    story = Story()
    norms = {f"layer{i}": float(i) for i in range(1000)}
    story.at(0, {"gradient/parameter_norm": norms}, lane="fast")
    broken = {**{k: 10 * v for k, v in norms.items()}, "layer3": math.nan}
    (alert,) = story.at(1, {LOSS: math.nan, "gradient/parameter_norm": broken}, BAD, lane="fast")
    assert len(alert.bundle["tensors"]) == 1  # where some are not finite only those are to be looked at
    again = Alert.from_dict(alert.to_dict())
    assert np.isnan(again.bundle["loss/value"][-1])
    assert again.to_dict() == alert.to_dict()
    (alert,) = story.at(
        500, {"gradient/parameter_norm": {k: 99 * v for k, v in norms.items()}}, jump, spike, lane="fast"
    )
    assert len(alert.bundle["tensors"]) == 8
