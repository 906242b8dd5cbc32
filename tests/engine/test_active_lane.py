"""Monitors that run forward passes of their own: when they are due, without a trace, alike on all ranks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_on_ranks
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.lanes import MonitorFault
from traindiag.monitors.active import ActiveMonitor
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import read_log
from traindiag.record.recording import read_recordings
from traindiag.record.signal import Signal
from traindiag.transfer.states import Group, Reduced

HELD_OUT = Signal("held_out/mean", (), "mean output on a fixed batch", lane="active")


class Probing(ActiveMonitor):
    """Calls the model on a batch of its own in every third step, as carelessly as it can."""

    name = "probing"
    family = "held_out"
    signals = (HELD_OUT,)

    def __init__(self, fails_on: int | None = None) -> None:
        self.fails_on = fails_on
        self.model: nn.Module | None = None
        self.found: Tensor | None = None
        self.heard: list[tuple[int, str]] = []
        self.rank = 0
        self.closed = 0

    def due(self, step: int, updates: Mapping[str, int]) -> bool:
        return step % 3 == 1

    def probe(self, step: int) -> None:
        if self.fails_on == self.rank and step > 3:
            raise ZeroDivisionError("injected")
        assert self.model is not None
        self.model.train(step % 2 == 0)
        random.random(), np.random.rand()
        self.found = self.model(torch.randn(5, 4)).mean()

    def heed(self, frame: Frame) -> None:
        self.heard.append((frame.step, frame.lane))

    def close(self) -> None:
        self.closed += 1

    def collect(self) -> Sequence[Group]:
        found, self.found = self.found, None
        if found is None:
            return ()
        return (Group("all", Cells.single(), sums={"sum": found[None], "count": torch.ones(1)}),)

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        state = states["all"]
        return (Reading.scalar(HELD_OUT, float(state.sums["sum"][0] / state.sums["count"][0])),)


def train(probing: Probing | None, folder: Any = None, steps: int = 10, attach: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitors = [] if probing is None else [probing]
    if probing is not None:
        probing.model = model
    kind = Diagnostics.attach if attach else Diagnostics
    diagnostics = kind(model, optimizer, folder, monitors=monitors, terminal=False, every_n_steps=4, **settings)
    losses = []
    for _ in range(steps):
        if attach:
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).square().mean()
            loss.backward()
            optimizer.step()
        else:
            with diagnostics.step() as step:
                loss = step.loss(model(torch.randn(6, 4)).square().mean())
                loss.backward()
                step.gradients()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.detach())
    diagnostics.finish()
    left = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    draws = torch.rand(1), torch.tensor([random.random(), np.random.rand()])
    return [*losses, *left, *draws], diagnostics, [m.training for m in model.modules()]


@pytest.mark.parametrize("attach", [False, True])
def test_the_run_is_the_same_bit_for_bit(attach: bool) -> None:
    bare, _, modes = train(None, attach=attach)
    watched, diagnostics, same_modes = train(Probing(), attach=attach)
    assert len(bare) == len(watched) and all(a.equal(b) for a, b in zip(bare, watched))
    assert modes == same_modes
    assert diagnostics.history["held_out/mean"].steps.tolist() == [1, 4, 7]


def test_every_frame_is_shown_in_order_and_its_end_is_told() -> None:
    probing = Probing()
    train(probing)
    assert [s for s, lane in probing.heard if lane == "fast"] == list(range(10))
    assert [s for s, lane in probing.heard if lane == "active"] == [1, 4, 7]
    assert probing.heard == sorted(probing.heard, key=lambda h: (h[0], ("fast", "slow", "active").index(h[1])))
    assert probing.closed


def test_the_log_gives_the_same_frames_back(tmp_path: Any) -> None:
    _, diagnostics, _ = train(Probing(), tmp_path)
    stored = read_log(tmp_path).history["held_out/mean"]
    live = diagnostics.history["held_out/mean"]
    assert stored.steps.tolist() == live.steps.tolist() and stored.values.tolist() == live.values.tolist()
    frames = [f for recording in read_recordings(tmp_path) for f in recording.frames() if f.lane == "active"]
    assert [f.step for f in frames] == [1, 4, 7]


def test_a_fault_switches_it_off_and_training_goes_on() -> None:
    probing = Probing(fails_on=0)
    with pytest.warns(RuntimeWarning, match="monitor 'probing' is switched off on all ranks: failed in probe"):
        watched, diagnostics, _ = train(probing)
    bare, _, _ = train(None)
    assert all(a.equal(b) for a, b in zip(bare, watched))
    assert diagnostics.history["held_out/mean"].steps.tolist() == [1]
    assert probing.closed
    with pytest.raises(MonitorFault, match="probing"):
        train(Probing(fails_on=0), strict=True)


def on_rank(rank: int, fails_on: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    probing = Probing(fails_on)
    probing.model, probing.rank = inner, rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnostics = Diagnostics(model, optimizer, monitors=[probing], terminal=False, every_n_steps=4)
        torch.manual_seed(rank)
        for _ in range(12):
            with diagnostics.step() as step:
                loss = step.loss(model(torch.randn(6, 4)).square().mean())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        diagnostics.finish()
    seen = diagnostics.history.get("held_out/mean")
    return {
        "steps": [] if seen is None else seen.steps.tolist(),
        "values": [] if seen is None else seen.values.tolist(),
        "heard": probing.heard,
    }


@pytest.mark.parametrize("fails_on", [None, 1])
def test_two_ranks_agree_and_neither_waits_for_the_other(fails_on: int | None) -> None:
    first, second = run_on_ranks(on_rank, fails_on)
    assert first == second
    assert first["steps"] == ([1, 4, 7, 10] if fails_on is None else [1])
