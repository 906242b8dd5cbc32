"""Frames judged by the order of the live engine, without an engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook, own_rules
from traindiag.record.frame import Frame
from traindiag.record.series import History
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import Rule
from traindiag.rules.rule_set import RuleSet


@dataclass
class Judged:
    """What rules found in the frames of one run.

    Args:
        alerts: Every message, oldest first; the book of a live run forgets the oldest of more than 500.
        history: Every signal.
        unjudged: Rules that could not be judged, with the signals that they wait for.
        steps: Steps of which there was at least one reading.
        last: The last of them, -1 where there was none.
        rules: Names of the rules.
        notes: Rules that were switched off by a fault of their own, in words.
    """

    alerts: list[Alert] = field(default_factory=list)
    history: History = field(default_factory=History)
    unjudged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    steps: int = 0
    last: int = -1
    rules: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def judge(frames: Iterable[Frame], rules: Sequence[Rule] | None, run_id: str) -> Judged:
    """Judges frames one after the other, as ``engine.judge.Judge`` does when they arrive.

    Args:
        frames: In the order in which they were measured.
        rules: In place of the default pack. They are copied: what one run taught them must not judge the next.
        run_id: What alert ids are made of.
    """
    judged = Judged()
    taken = default_rules() if rules is None else [copy.deepcopy(rule) for rule in rules]
    rule_set = RuleSet(
        taken,
        on_fault=lambda name, error: judged.notes.append(
            f"rule {name!r} is switched off: {type(error).__name__}: {error}"
        ),
    )
    book = AlertBook(run_id, own=own_rules(taken))
    for frame in frames:
        judged.alerts += book.update(frame, rule_set.update(frame))
        judged.history.append(frame)
        if frame.readings and frame.step != judged.last:
            judged.steps, judged.last = judged.steps + 1, frame.step
    left_out = rule_set.not_asked_for() if rules is None else set()  # of the pack; what was given is waited for
    judged.unjudged = {n: s for n, s in rule_set.unjudged().items() if n not in left_out}
    judged.rules = tuple(rule.name for rule in rule_set.rules if rule.name not in left_out)
    return judged
