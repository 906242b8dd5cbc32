"""Calm steps are judged together, a few steps late, and nothing that is judged or kept differs for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from traindiag import Diagnostics
from traindiag.engine.judge import BATCH
from traindiag.record.frame import Frame
from traindiag.rules.rule import Rule, Verdict

STEPS = 70


class Told(Rule):
    """Remembers when it saw which step."""

    name, signals = "told", ("loss/value",)

    def __init__(self, patient: bool, open_at: int = -1) -> None:
        self.patient, self.open_at = patient, open_at
        self.seen: list[tuple[int, int]] = []
        self.now = 0

    def update(self, frame: Frame) -> Sequence[Verdict]:
        self.seen.append((frame.step, self.now))
        if frame.step == self.open_at:
            return (Verdict(self.name, "threshold", "loss/value", frame.step, cooldown=1),)
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def train(
    rule: Told, *, jump: Sequence[int] = (), aside: bool = True, checkpoints: Sequence[int] = ()
) -> Diagnostics:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def watch() -> Diagnostics:
        return Diagnostics(
            model,
            optimizer,
            rules=[rule],
            default_rules=False,
            terminal=False,
            max_overhead=None,
            every_n_steps=1000,
            strict=True,
        )

    diagnostics = watch()
    for step in range(STEPS):
        if step in checkpoints:
            state = diagnostics.state_dict()
            diagnostics.finish()
            diagnostics = watch()
            diagnostics.load_state_dict(state)
        rule.now = step
        diagnostics.begin()
        loss = model(torch.ones(3, 4) * (10 if step in jump else 1)).square().mean()
        diagnostics.loss(loss)
        if aside:
            diagnostics.before_backward()
        loss.backward()
        diagnostics.gradients()
        optimizer.step()
        optimizer.zero_grad()
        diagnostics.end()
    diagnostics.finish()
    return diagnostics


@pytest.mark.parametrize("aside", [True, False])
def test_a_calm_step_waits_for_others_and_keeps_its_place(aside: bool) -> None:
    rule = Told(patient=True)
    train(rule, aside=aside)
    assert [step for step, _ in rule.seen] == list(range(STEPS))
    late = [now - step for step, now in rule.seen[2:]]
    assert max(late) == BATCH and len({now for _, now in rule.seen}) <= 2 + STEPS / BATCH + 2


def test_history_is_the_same_as_where_every_step_is_judged_at_once() -> None:
    calm, prompt = (train(Told(patient=p), jump=[20, 21, 40]).history for p in (True, False))
    assert {n: (s.steps.tolist(), s.values.tolist()) for n, s in calm.items()} == {
        n: (s.steps.tolist(), s.values.tolist()) for n, s in prompt.items()
    }


def test_a_step_that_stirs_is_judged_one_step_later_and_all_before_it() -> None:
    rule = Told(patient=True)
    train(rule, jump=[30, 45])
    seen = dict(rule.seen)
    assert seen[30] == 31 and seen[45] == 46
    assert all(seen[step] <= 31 for step in range(30))


def test_a_rule_that_is_not_patient_sees_every_step_one_step_later() -> None:
    rule = Told(patient=False)
    train(rule)
    assert all(now == step + 1 for step, now in rule.seen[:-1])


def test_what_is_asked_for_is_up_to_date() -> None:
    rule = Told(patient=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    diagnostics = Diagnostics(model, optimizer, rules=[rule], terminal=False, strict=True)
    for step in range(STEPS):
        with diagnostics.step() as s:
            s.loss(model(torch.ones(3, 4)).square().mean()).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad()
        if step:
            assert diagnostics.history["loss/value"].steps[-1] == step - 1
    diagnostics.finish()
    assert [step for step, _ in rule.seen] == list(range(STEPS))


@pytest.mark.parametrize("opens", [12, 25, 26, 31, 40])
@pytest.mark.parametrize("jump", [(), (26,)])
def test_a_burst_begins_at_the_same_step_wherever_a_checkpoint_hurries_the_verdict(
    opens: int, jump: tuple[int, ...]
) -> None:
    def samples(checkpoints: Sequence[int]) -> list[int]:
        run = train(Told(True, opens), jump=jump, checkpoints=checkpoints)
        return [s for s in run.history["gradient/rms"].steps.tolist() if s >= opens]

    whole = samples(())
    assert len(whole) == min(20, STEPS - (opens + 2 + (0 if opens in jump else BATCH)))
    for at in (opens + 1, opens + 2, opens + 5):
        assert samples([at]) == [s for s in whole if s >= at]
