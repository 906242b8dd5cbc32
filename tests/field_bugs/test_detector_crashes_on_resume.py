"""Lightning's SpikeDetection loads its state into an attribute that does not exist and dies on every resume."""

from __future__ import annotations

import io

import torch

from tests.rules.frames import frame, reading
from traindiag.alerts.book import AlertBook
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule_set import RuleSet


def test_the_default_pack_resumes_through_a_checkpoint() -> None:
    rules, book = RuleSet(default_rules(), strict=True), AlertBook("r")
    for step in range(6):
        made = frame(step, reading([1.0], "gradient/norm"), reading([2e3, 5.0], "attention/logit_range"))
        book.update(made, rules.update(made))
    buffer = io.BytesIO()
    torch.save({"rules": rules.state_dict(), "book": book.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again, other = RuleSet(default_rules(), strict=True), AlertBook("r")
    again.load_state_dict(state["rules"])
    other.load_state_dict(state["book"])
    jump = frame(6, reading([30.0], "gradient/norm"), reading([2e3, 5.0], "attention/logit_range"))
    assert [a.rule for a in other.update(jump, again.update(jump))] == ["gradient/norm-spike"]
    assert [a.rule for a in other.alerts] == ["attention/logit-range", "gradient/norm-spike"]
