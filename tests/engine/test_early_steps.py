"""Wiring is looked at in the 1st, 2nd, 10th and 100th step, and nothing else takes notice of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.ranks import run_on_ranks
from traindiag.alerts.alert import Alert
from traindiag.engine.diagnostics import Diagnostics
from traindiag.monitors.wiring import WiringMonitor
from traindiag.panels.aggregates import Aggregates
from traindiag.record.frame import Frame

STEPS = 104
CADENCE = 25
SAMPLES = [0, 25, 50, 75, 100]
LOOKS = [0, 1, 9, 25, 50, 75, 99, 100]


class Frames:
    """Every frame of a run, in the order in which they are told."""

    def __init__(self, diagnostics: Diagnostics) -> None:
        self.frames: list[Frame] = []
        tell = diagnostics._outlet.frame

        def told(frame: Frame, alerts: Any) -> Any:
            self.frames.append(frame)
            return tell(frame, alerts)

        diagnostics._outlet.frame = told  # type: ignore[method-assign]


def watch(model: nn.Module, **settings: Any) -> tuple[torch.optim.Optimizer, Diagnostics]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"every_n_steps": CADENCE, "max_overhead": None, "terminal": False, "strict": True, **settings}
    return optimizer, Diagnostics(model, optimizer, **settings)


def go(
    diagnostics: Diagnostics,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: int,
    stop: int,
    before: Callable[[int], None] = lambda i: None,
) -> None:
    for i in range(start, stop):
        before(i)
        with diagnostics.step() as step:
            step.loss(loss_of(model, batch(i, size=1, length=6))).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()


def run(**settings: Any) -> tuple[Diagnostics, list[Frame]]:
    model = gpt(layers=1)
    optimizer, diagnostics = watch(model, **settings)
    told = Frames(diagnostics)
    go(diagnostics, model, optimizer, 0, STEPS)
    diagnostics.finish()
    return diagnostics, told.frames


def test_only_wiring_is_looked_at() -> None:
    diagnostics, frames = run()
    steps = {name: series.steps.tolist() for name, series in diagnostics.history.items()}
    wiring = {name: at for name, at in steps.items() if name.startswith("wiring/")}
    assert wiring.keys() == {f"wiring/{n}" for n in ("ungraded", "unchanged", "owners")}
    assert all(at == LOOKS for at in wiring.values())
    sampled = [name for name in steps if name.split("/")[0] in ("attention", "output", "activation")]
    sampled += ["gradient/rms", "gradient/norm_applied", "optimizer/update_rms", "optimizer/rms_t"]
    assert len(sampled) > 12 and all(steps[name] == SAMPLES for name in sampled)
    early = [f.step for f in frames if f.early]
    assert early == [1, 9, 99] and [f.step for f in frames if f.sampled] == SAMPLES
    assert all(f.readings.keys() <= wiring.keys() for f in frames if f.early)


def test_dashboards_get_the_points_that_they_had() -> None:
    _, frames = run()
    with_them, without = Aggregates(), Aggregates()
    for frame in frames:
        points = with_them.update(frame)
        assert points == ({} if frame.early else without.update(frame))


def test_nothing_is_sent_where_nobody_asks_for_it() -> None:
    _, frames = run(exclude=["wiring"])
    assert not any(f.early for f in frames)
    _, frames = run(every_n_steps=1, exclude=["attention", "output", "activation"])
    assert not any(f.early for f in frames)  # each of them is sampled


def test_a_resumed_job_looks_at_the_same_steps() -> None:
    whole, _ = run()
    for cut in (1, 9, 40, 99):
        model = gpt(layers=1)
        optimizer, diagnostics = watch(model)
        go(diagnostics, model, optimizer, 0, cut)
        state = diagnostics.state_dict()
        second, resumed = watch(model)
        second.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(state)
        go(resumed, model, second, cut, STEPS)
        resumed.finish()
        for name in ("wiring/ungraded", "attention/max_logit"):
            series, kept = whole.history[name], resumed.history[name]
            assert kept.steps.tolist() == [s for s in series.steps.tolist() if s >= cut], (cut, name)
            np.testing.assert_array_equal(kept.values, series.values[series.steps >= cut])


def test_coverage_waits_for_a_sample(tmp_path: Path) -> None:
    told: list[tuple[int, set[str]]] = []
    model = gpt(layers=1)
    optimizer, diagnostics = watch(model)
    go(diagnostics, model, optimizer, 0, 9)
    state = diagnostics.state_dict()
    optimizer, resumed = watch(model)
    resumed.load_state_dict(state)
    resumed._outlet.coverage = lambda run, rows, step: told.append(  # type: ignore[method-assign]
        (step, {r.family for r in rows if r.sight != "unseen"})
    )
    go(resumed, model, optimizer, 9, 30)
    resumed.finish()
    ((step, seen),) = told
    assert step == CADENCE and "attention" in seen


@pytest.mark.parametrize("cut", [1, 9])
def test_a_loop_that_goes_on_in_such_a_step_sees_everything_later(cut: int) -> None:
    model = gpt(layers=1)
    optimizer, diagnostics = watch(model)
    go(diagnostics, model, optimizer, 0, cut)
    diagnostics.finish()  # as after an exception
    go(diagnostics, model, optimizer, cut, 27)
    diagnostics.finish()
    assert diagnostics.history["attention/max_logit"].steps.tolist() == [0, 25]
    assert diagnostics.history["optimizer/rms_t"].steps.tolist() == [0, 25]


def test_without_the_fast_lane_such_steps_measure_wiring_alone() -> None:
    diagnostics, _ = run(fast=False)
    assert diagnostics.history["gradient/norm"].steps.tolist() == SAMPLES
    assert diagnostics.history["wiring/ungraded"].steps.tolist() == LOOKS


def wired_wrongly(every: int) -> list[Alert]:
    model = gpt(layers=1)
    layer = model.blocks[0].mlp[2]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.detach(), layer.bias)
    optimizer, diagnostics = watch(model, every_n_steps=every)
    go(diagnostics, model, optimizer, 0, 30)
    diagnostics.finish()
    return [a for a in diagnostics.alerts if a.rule == "wiring/ungraded"]


def test_a_fault_is_told_at_the_tenth_step_whatever_the_cadence() -> None:
    for every in (10, 100):
        (alert,) = wired_wrongly(every)
        assert (alert.step, alert.where) == (9, "AdamW blocks.0.mlp.2.weight")


class FailsOnRankOne(WiringMonitor):
    """Raises on one rank, in the second step."""

    rank = 0
    looks = 0

    def before_update(self, optimizer: str, update: Any) -> None:
        self.looks += 1
        if self.rank == 1 and self.looks == 2:
            raise ZeroDivisionError("injected")
        super().before_update(optimizer, update)


def on_a_rank(rank: int, fails: bool) -> dict[str, list[int]]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(gpt(layers=1))
    monitor = FailsOnRankOne()
    monitor.rank = rank if fails else 0
    optimizer, diagnostics = watch(model, monitors=[monitor], strict=False)
    go(diagnostics, model, optimizer, 0, 28)
    diagnostics.finish()
    return {name: series.steps.tolist() for name, series in diagnostics.history.items()}


def test_two_ranks_look_at_the_same_steps() -> None:
    first, second = run_on_ranks(on_a_rank, False)
    assert first == second
    assert first["wiring/replicas_differ"] == [0, 1, 9, 25] and first["attention/entropy"] == [0, 25]


@pytest.mark.filterwarnings("ignore:.*traindiag")
def test_a_monitor_that_fails_in_such_a_step_is_off_on_both() -> None:
    first, second = run_on_ranks(on_a_rank, True)
    assert first == second
    assert first["wiring/ungraded"] == [0] and first["attention/entropy"] == [0, 25]
