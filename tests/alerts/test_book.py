"""One event a rule: opened, escalated, closed, and never a flood."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.rules.frames import frame, reading
from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook
from traindiag.record.cells import Cell
from traindiag.rules.rule import Severity, Verdict

HIGH = Verdict(
    "high",
    "threshold",
    "attention/logit_range",
    0,
    value=2e3,
    limit=1e3,
    evidence="it is high",
    cooldown=10,
    cell=Cell(("layer", "head"), ("blocks.0", 1)),
)


def play(said: dict[int, Severity | None], until: int, book: AlertBook | None = None) -> list[tuple[int, str, str]]:
    """``None`` ends the condition; steps that are not given say nothing."""
    book = book or AlertBook("run")
    told: list[Alert] = []
    for step in range(until):
        verdicts = []
        if step in said:
            severity = said[step]
            verdicts = [replace(HIGH, step=step, active=severity is not None, severity=severity or "info")]
        told += book.update(frame(step), verdicts)
    return [(a.step, a.status, a.severity) for a in told]


def test_an_event_is_told_when_it_opens_gets_worse_and_is_over() -> None:
    said: dict[int, Severity | None] = {0: "info", 1: "info", 2: "warning", 3: "info", 4: "critical", 5: None}
    assert play(said, 40) == [
        (0, "opened", "info"), (2, "escalated", "warning"), (4, "escalated", "critical"), (15, "closed", "critical"),
    ]  # fmt: skip


def test_what_comes_back_within_the_cooldown_is_the_same_event() -> None:
    assert play({0: "warning", 1: None, 9: "warning", 10: None}, 40) == [
        (0, "opened", "warning"), (20, "closed", "warning"),
    ]  # fmt: skip
    assert play({0: "warning", 1: None, 11: "warning"}, 40) == [
        (0, "opened", "warning"), (11, "closed", "warning"), (11, "opened", "warning"),
    ]  # fmt: skip


def test_frames_without_verdicts_in_between_are_not_needed_to_close() -> None:
    book = AlertBook("run")
    book.update(frame(0), [HIGH])
    book.update(frame(1), [replace(HIGH, step=1, active=False)])
    assert [a.status for a in book.update(frame(500), [replace(HIGH, step=500)])] == ["closed", "opened"]
    assert [a.status for a in book.alerts] == ["opened", "closed", "opened"]
    assert len({a.id for a in book.alerts}) == 2


def test_ids_are_made_of_run_rule_cell_and_opening_step() -> None:
    def opened(run: str, verdict: Verdict) -> str:
        return AlertBook(run).update(frame(verdict.step), [verdict])[0].id

    same = opened("run", HIGH)
    assert opened("run", replace(HIGH, value=5.0)) == same
    others = [
        opened("other", HIGH),
        opened("run", replace(HIGH, rule="x")),
        opened("run", replace(HIGH, step=1)),
        opened("run", replace(HIGH, cell=Cell((), ()))),
    ]
    assert len({same, *others}) == 5


def test_steps_become_hours_at_the_pace_of_the_run() -> None:
    verdict = replace(HIGH, kind="forecast", steps_to_limit=(60.0, 80.0, 110.0))
    (alert,) = AlertBook("run").update(frame(0, seconds_per_step=2.0, segment=3, time=9.0), [verdict])
    assert alert.time_to_limit == (120.0, 160.0, 220.0)
    assert (alert.clock, alert.family, alert.segment, alert.time, alert.where) == (
        "slow", "attention", 3, 9.0, "blocks.0 head 1",
    )  # fmt: skip
    (alert,) = AlertBook("run").update(frame(0), [replace(verdict, signal="gradient/norm")])
    assert (alert.time_to_limit, alert.clock) == (None, "fast")
    fast = reading([1.0])
    (alert,) = AlertBook("run").update(frame(0, fast), [replace(verdict, signal="user/x")])
    assert alert.clock == fast.signal.clock


def test_a_flapping_rule_does_not_flood_and_the_list_is_bounded() -> None:
    draw, book = random.Random(0), AlertBook("run", keep=20)
    severities: list[Severity | None] = ["info", "warning", "critical", None]
    told = play({step: draw.choice(severities) for step in range(0, 2000)}, 2000, book)
    assert len(told) <= 4 * 2000 / 10
    book.update(frame(5000), [])
    for step in range(6000, 12000, 100):
        book.update(frame(step), [replace(HIGH, step=step)])
        book.update(frame(step + 1), [replace(HIGH, step=step + 1, active=False)])
    assert len(book.alerts) == 20
    assert [a.step for a in book.alerts] == sorted(a.step for a in book.alerts)


def test_cut_anywhere_the_alerts_are_those_of_an_unbroken_run() -> None:
    draw = random.Random(1)
    over, worse = replace(HIGH, active=False), replace(HIGH, severity="critical", value=float("nan"))
    said = {step: draw.choice([[HIGH], [worse], [over], [over], *[[]] * 12]) for step in range(300)}

    def go(book: AlertBook, steps: range) -> AlertBook:
        for step in steps:
            book.update(frame(step), [replace(v, step=step) for v in said[step]])
        return book

    whole = [a.to_dict() for a in go(AlertBook("run"), range(300)).alerts]
    assert len(whole) > 5
    for cut in range(0, 300, 13):
        second = AlertBook("run")
        second.load_state_dict(go(AlertBook("run"), range(cut)).state_dict())
        assert [a.to_dict() for a in go(second, range(cut, 300)).alerts] == whole
