"""One event a failure: witnesses join, severity rises, all of it closes once, in any number of jobs."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import torch

from tests.alerts.diagnosis.story import RUN, Story, over, said
from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook
from traindiag.record.cells import Cell
from traindiag.rules.rule import Verdict

RANGE = "attention/logit_range"
HEAD = Cell(("layer", "head"), ("blocks.0", 1))

to_damage = said(RANGE, "forecast", 400.0, 1e3, at=HEAD, rule="to damage", steps_to_limit=(60.0, 80.0, 110.0))
to_divergence = said(
    RANGE, "forecast", 400.0, 1e4, at=HEAD, rule="to divergence", steps_to_limit=(200.0, 300.0, 400.0)
)
too_large = said(RANGE, "threshold", 1100.0, 1e3, at=HEAD, rule="too large")
far_too_large = replace(too_large, value=1.1e4, limit=1e4, severity="critical")


def told(alerts: list[Alert]) -> list[tuple[int, str, str, str]]:
    return [(a.step, a.status, a.severity, a.diagnosis) for a in alerts]


def test_two_forecasts_and_a_threshold_are_one_event() -> None:
    story, name = Story(), "attention-logit growth"
    story.at(0, {RANGE: 5.0})
    story.at(40, {RANGE: 400.0}, to_damage)
    story.at(50, {RANGE: 500.0}, to_damage, to_divergence)
    story.at(60, {RANGE: 1100.0}, over(to_damage), to_divergence, too_large)
    story.at(90, {RANGE: 1.1e4}, over(to_divergence), far_too_large)
    story.at(120, {RANGE: 5.0}, over(far_too_large))
    assert story.at(219, {RANGE: 5.0}) == []  # 100 steps of rest
    story.at(220, {RANGE: 5.0})
    assert told(story.book.alerts) == [
        (40, "opened", "warning", name), (90, "escalated", "critical", name), (220, "closed", "critical", name),
    ]  # fmt: skip
    opened, worse, closed = story.book.alerts
    assert opened.id == worse.id == closed.id
    assert (opened.rule, worse.rule) == ("to damage", "too large")
    assert "over since step 120" in closed.evidence
    assert closed.title == f"Over: {worse.title}"
    assert closed.remedies == ()


def test_an_event_lasts_as_long_as_one_of_its_witnesses() -> None:
    story = Story()
    story.at(40, {}, to_damage, too_large)
    story.at(50, {}, over(to_damage), too_large)
    for step in range(60, 400, 10):
        assert story.at(step, {}, too_large) == []
    story.at(400, {}, over(too_large))
    assert story.at(450, {}, to_damage) == []  # back within the cooldown: the same event
    story.at(460, {}, over(to_damage))
    assert [a.status for a in story.at(560, {})] == ["closed"]


def test_other_failures_and_unexplained_rules_keep_their_own_events() -> None:
    story = Story()
    reward, other = (said("reward/kl", "threshold", 30.0, 10.0, rule=name) for name in ("a", "b"))
    alerts = story.at(9, {}, to_damage, reward, other, said("output/log_z", "trend", 60.0))
    assert [(a.diagnosis, a.family) for a in alerts] == [
        ("attention-logit growth", "attention"), ("", "reward"), ("", "reward"),
        ("output-logit divergence", "output"),
    ]  # fmt: skip
    assert len({a.id for a in alerts}) == 4


def test_a_rule_of_the_users_own_is_told_under_its_name_whatever_else_is_open() -> None:
    mine = replace(too_large, rule="mine")
    story = Story(book=AlertBook("r", own=["mine"]))
    story.at(40, {}, to_damage)
    (alert,) = story.at(50, {}, to_damage, mine)
    assert (alert.rule, alert.status, alert.diagnosis) == ("mine", "opened", "attention-logit growth")
    before = Story(book=AlertBook("r", own=["mine"]))
    (first,) = before.at(40, {}, mine)
    (second,) = before.at(50, {}, mine, to_damage)
    assert (second.status, second.rule, second.id != first.id) == ("opened", "to damage", True)


def test_two_wiring_faults_are_not_one() -> None:
    tensors = [Cell(("optimizer", "parameter"), ("adam", name)) for name in "ab"]
    faults = [said(f"wiring/{s}", "wiring", 1.0, at=at) for s, at in zip(("ungraded", "unchanged"), tensors)]
    assert len(Story().at(9, {}, *faults)) == 2


def random_run(seed: int, steps: int) -> dict[int, tuple[dict[str, float], list[Verdict]]]:
    draw = random.Random(seed)
    jump = said("gradient/norm", "spike", 30.0, 4.0, severity="info")
    spike = said("loss/value", "spike", 9.0, 4.0, severity="info")
    behind = said(
        "optimizer/sentinel_rms_t", "threshold", 4.0, 2.3, at=Cell(("optimizer", "parameter"), ("adam", "e"))
    )
    rules = [to_damage, to_divergence, too_large, jump, spike, behind]
    run = {}
    for step in range(steps):
        numbers = {n: draw.lognormvariate(0, 1) for n in (RANGE, "loss/value", "gradient/norm")}
        numbers |= {"gradient/parameter_norm": draw.random(), "optimizer/sentinel_rms_t": draw.random()}
        chosen = [draw.choice([v, over(v)]) for v in rules if draw.random() < 0.05]
        run[step] = (numbers, [replace(v, cooldown=10) for v in chosen])
    return run


def test_cut_anywhere_the_diagnoses_are_those_of_an_unbroken_run() -> None:
    run = random_run(0, 300)

    def go(book: AlertBook, steps: range) -> AlertBook:
        story = Story(book=book)
        for step in steps:
            numbers, verdicts = run[step]
            story.at(step, numbers, *verdicts, lane="fast")
        return book

    whole = [a.to_dict() for a in go(AlertBook("r"), range(300)).alerts]
    assert {a["status"] for a in whole} == {"opened", "escalated", "closed"}
    assert len({a["diagnosis"] for a in whole}) >= 3
    assert any(a["bundle"].get("tensors") for a in whole)
    for cut in range(0, 300, 7):
        buffer, second = io.BytesIO(), AlertBook("r")
        torch.save(go(AlertBook("r"), range(cut)).state_dict(), buffer)
        buffer.seek(0)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        assert [a.to_dict() for a in go(second, range(cut, 300)).alerts] == whole, cut


def test_a_checkpoint_from_before_there_were_diagnoses() -> None:
    verdict = {
        "rule": "too large", "kind": "threshold", "signal": RANGE, "step": 40, "active": True, "severity": "warning",
        "cell": [["layer", "head"], ["blocks.0", 1]], "value": 1100.0, "limit": 1000.0, "others": 0,
        "steps_to_limit": None, "rank": None, "evidence": "it is high", "cooldown": 100,
    }  # fmt: skip
    alert = Story().at(40, {}, too_large)[0].to_dict()
    old = {k: v for k, v in alert.items() if k not in ("diagnosis", "bundle")}
    events = {"too large": {"id": alert["id"], "told": "warning", "ended": None, "last": verdict}}
    book = AlertBook("r")
    book.load_state_dict({"alerts": [old], "events": events})
    assert (book.alerts[0].diagnosis, book.alerts[0].bundle) == ("", {})
    story = Story(RUN, book)
    assert story.at(50, {}, too_large, to_damage) == []  # the event goes on, and a witness joins it
    (worse,) = story.at(60, {}, far_too_large)
    assert (worse.id, worse.status, worse.diagnosis) == (alert["id"], "escalated", "attention-logit growth")
    story.at(70, {}, over(far_too_large), over(to_damage))
    assert [a.id for a in story.at(170, {})] == [alert["id"]]
    assert told(book.alerts)[-1][1] == "closed"
