"""Judging beside the backward pass: the same verdicts at the same place as without the thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from traindiag import Diagnostics, Threshold
from traindiag.engine.aside import Aside


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "traindiag" and t.is_alive()]


def test_what_work_raises_is_raised_where_its_result_is_taken() -> None:
    aside = Aside[int]()
    aside.start(lambda: 1 // 0)
    aside.wait()
    assert aside.busy  # waiting takes nothing
    with pytest.raises(ZeroDivisionError):
        aside.take()
    aside.start(lambda: 7)
    with pytest.raises(RuntimeError, match="must be taken"):
        aside.start(lambda: 8)
    assert aside.take() == 7
    with pytest.raises(RuntimeError, match="no work"):
        aside.take()
    aside.close()


def test_work_that_never_ends_is_given_up_and_what_comes_late_is_nobodys() -> None:
    aside, gate = Aside[str](), threading.Event()

    def late() -> str:
        gate.wait(10)
        return "late"

    aside.start(late)
    with pytest.raises(TimeoutError):
        aside.take(patience=0.05)
    aside.start(lambda: "new")
    gate.set()
    assert aside.take() == "new"
    aside.close()


def test_work_that_waits_for_itself_does_not_hang() -> None:
    aside = Aside[str]()

    def asks() -> str:
        aside.wait()  # as a rule of the user's does that reads diagnostics.history
        return "done"

    aside.start(asks)
    assert aside.take(patience=5) == "done"
    aside.close()


def test_an_interrupt_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    aside = Aside[str]()
    aside.start(lambda: "first")
    aside.wait()
    work, outcomes = aside._lines

    class Interrupted:
        def get(self, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(aside, "_lines", (work, Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        aside.take()
    monkeypatch.setattr(aside, "_lines", (work, outcomes))
    assert aside.busy and aside.take() == "first"
    aside.close()


def test_the_thread_ends_with_the_run() -> None:
    before = len(threads())
    run(aside=True)
    deadline = time.monotonic() + 5
    while len(threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads()) <= before


def run(*, aside: bool, reads: bool = False) -> tuple[list[Any], list[tuple[int, int, str]]]:
    """Trains and gives back the history, and at which step of the loop each alert was told."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told: list[tuple[int, int, str]] = []
    at = -1
    diagnostics = Diagnostics(
        model,
        optimizer,
        terminal=False,
        strict=True,
        max_overhead=None,
        rules=[Threshold("gradient/norm", above=5.0, cooldown=1, name="large")],
        actions=[lambda alert: told.append((at, alert.step, alert.status))],
    )
    for at in range(12):
        diagnostics.begin()
        loss = model(torch.ones(3, 4) * (50 if at in (4, 9) else 1)).square().mean()
        diagnostics.loss(loss)
        if aside:
            diagnostics.before_backward()
        if reads:  # in the middle of a step, while the thread may be at work
            assert len(diagnostics.history["loss/value"]) >= at if at else True
            assert isinstance(diagnostics.alerts, list)
        loss.backward()
        diagnostics.after_backward()
        diagnostics.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        diagnostics.end()
    diagnostics.finish()
    values = [(name, s.steps.tolist(), s.values.tolist()) for name, s in diagnostics.history.items()]
    return values, told


def test_with_the_thread_and_without_it_the_same_is_told_at_the_same_steps() -> None:
    values, told = run(aside=False)
    assert (5, 4, "opened") in told  # exactly one step later
    assert run(aside=True) == (values, told)
    assert run(aside=True, reads=True) == (values, told)
