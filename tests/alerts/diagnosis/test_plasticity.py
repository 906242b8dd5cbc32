"""Failures of critics, each told by its name, and what only looks like one."""

from __future__ import annotations

from dataclasses import replace

from tests.alerts.diagnosis.story import Story, said
from traindiag.record.cells import Cell

FAU, NORM, RATIO = "plasticity/fau_pooled", "plasticity/weight_norm_ratio", "plasticity/q_bound_ratio"
CRITIC = Cell(("module",), ("critic",))


def test_early_loss_and_panel_are_one_failure() -> None:
    story = Story()
    story.at(15, {FAU: 0.45, NORM: 1.0, RATIO: 0.01}, lane="active")
    lost = said(FAU, "stage", 0.2, 0.27, at=CRITIC)
    (first,) = story.at(4000, {FAU: 0.2, NORM: 8.0, RATIO: 0.4}, lost, lane="active")
    assert (first.diagnosis, first.family, first.severity) == ("loss of plasticity", "plasticity", "warning")
    assert first.title == "The network is losing its plasticity at critic"
    assert f"{NORM} was 1 at step 15 and is 8" in first.evidence
    assert any(RATIO in text and "at most 0.4" in text for text in first.ruled_out)
    words = " ".join(r.text for r in first.remedies)
    assert all(w in words for w in ("replay ratio", "LayerNorm", "Reset", "ReDo")) and all(
        r.source for r in first.remedies
    )
    panel = said("plasticity/srank_99", "panel", 20.0, 50.0, severity="critical", at=CRITIC)
    (second,) = story.at(4500, {FAU: 0.2}, lost, panel, lane="active")
    assert (second.status, second.severity, second.id) == ("escalated", "critical", first.id)


def test_one_sign_is_a_note_without_remedies() -> None:
    story = Story()
    story.at(15, {NORM: 1.0}, lane="active")
    note = said(NORM, "panel", 12.0, 10.0, severity="info", at=CRITIC)
    (told,) = story.at(4000, {NORM: 12.0}, note, lane="active")
    assert told.title == "One sign of lost plasticity at critic" and not told.remedies
    assert "right in some environments and wrong in others" in told.cause


def test_soft_divergence() -> None:
    story = Story()
    story.at(15, {RATIO: 0.1, "plasticity/q_mean": 0.5, "plasticity/twin_gap": 0.1}, lane="active")
    over = said(RATIO, "threshold", 1.4, 1.0, at=CRITIC)
    (told,) = story.at(4000, {RATIO: 1.4, "plasticity/q_mean": 90.0, "plasticity/twin_gap": 7.0}, over, lane="active")
    assert (told.diagnosis, told.title) == (
        "soft divergence of Q",
        "Values are larger than any return can be at critic",
    )
    assert "plasticity/q_mean was 0.5 at step 15 and is 90" in told.evidence
    assert "double Q-learning" in told.remedies[0].text


def test_a_healthy_plateau_is_told_as_what_it_is_and_a_loss_as_another_event() -> None:
    story = Story()
    story.at(15, {FAU: 0.45}, lane="active")
    calm = said(FAU, "stage", 0.4, 0.36, severity="info", at=CRITIC, rule="plateau")
    (told,) = story.at(4000, {FAU: 0.4}, calm, lane="active")
    assert (told.diagnosis, told.severity) == ("plasticity kept", "info") and "replay ratio" in told.remedies[0].text
    lost = said(FAU, "stage", 0.2, 0.27, at=CRITIC, rule="loss")
    (other,) = story.at(9000, {FAU: 0.2}, replace(calm, active=False), lost, lane="active")
    assert (other.diagnosis, other.status) == ("loss of plasticity", "opened")


def test_nan_of_a_critic_is_no_loss_of_plasticity() -> None:
    story = Story()
    broken = said(FAU, "nonfinite", float("nan"), severity="critical", at=CRITIC)
    (told,) = story.at(16, {FAU: float("nan")}, broken, lane="active")
    assert told.diagnosis not in ("loss of plasticity", "plasticity kept")
