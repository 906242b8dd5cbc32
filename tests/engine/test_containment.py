"""An error of our own, wherever it comes from, is told once, and the run goes on as if it were alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from tests.ranks import run_on_ranks
from traindiag.capture.window import Capture
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.judge import Judge
from traindiag.engine.lanes import MonitorLane
from traindiag.engine.meter import Meter
from traindiag.engine.outlet import Outlet
from traindiag.engine.schedule import Schedule
from traindiag.monitors.gradient import GradientMonitor
from traindiag.panels.tensorboard import TensorBoardPanels
from traindiag.record.series import History
from traindiag.transfer.lane import Lane
from traindiag.transfer.screen import Screen
from traindiag.transfer.states import Group

STEPS = 12
AT = 4

PLACES: list[tuple[type, str]] = [
    (Capture, "open"),
    (Capture, "pause"),
    (Capture, "resume"),
    (Capture, "close"),
    (Capture, "_enter"),
    (Capture, "_leave"),
    (MonitorLane, "each"),
    (MonitorLane, "send"),
    (MonitorLane, "receive"),
    (Lane, "_launch"),
    (Lane, "shelve"),
    (Lane, "receive"),
    (Screen, "stirs"),
    (Meter, "recent_shares"),
    (Judge, "hear"),
    (Judge, "state_dict"),
    (History, "append"),
    (Schedule, "account"),
    (Outlet, "start"),
    (Outlet, "frame"),
    (Outlet, "finish"),
    (TensorBoardPanels, "frame"),
    (TensorBoardPanels, "close"),
]
IDS = [f"{owner.__name__}.{name}" for owner, name in PLACES]


class Injected(Exception):
    pass


def break_it(owner: type, name: str, when: Callable[[], bool]) -> None:
    """From the moment that ``when`` holds, every call raises before it has done anything; clean-up only once."""
    original = getattr(owner, name)
    raised = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        if when() and not (owner is Capture and name == "close" and raised):
            raised += 1
            raise Injected(f"in {name}")
        return original(*args, **kwargs)

    setattr(owner, name, broken)


def run(
    folder: Path | None, *, owner: type | None = None, name: str = "", attach: bool = False, **settings: Any
) -> dict[str, Any]:
    """Trains with a fault of ours from the middle on; ``folder`` None trains without diagnostics."""
    model = gpt(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[Tensor] = []
    at = 0
    diagnostics: Diagnostics | None = None
    settings = {"every_n_steps": 2, "max_overhead": None, "terminal": False, **settings}

    def one(step: int) -> None:
        loss = loss_of(model, batch(step))
        losses.append(loss.detach().clone())
        if diagnostics is not None and not attach:
            diagnostics.loss(loss)
            diagnostics.before_backward()
        loss.backward()
        if diagnostics is not None and not attach:
            diagnostics.after_backward()
            diagnostics.gradients()
            diagnostics.log("user/number", float(step))
        optimizer.step()
        optimizer.zero_grad()

    states = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if folder is not None:
            diagnostics = (Diagnostics.attach if attach else Diagnostics)(model, optimizer, folder, **settings)
            if owner is not None:
                break_it(owner, name, lambda: at >= AT)
        for at in range(STEPS):
            if diagnostics is None or attach:
                one(at)
            else:
                with diagnostics.step():
                    one(at)
                states.append(diagnostics.state_dict())
        if diagnostics is not None:
            diagnostics.finish()
    return {
        "losses": torch.stack(losses),
        "parameters": [p.detach().clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "told": [str(w.message) for w in caught if "traindiag" in str(w.message)],
        "left": leftovers(model, optimizer),
        "states": states,
        "diagnostics": diagnostics,
    }


def assert_unharmed(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["losses"].equal(alone["losses"]) and found["rng"].equal(alone["rng"])
    assert all(a.equal(b) for a, b in zip(found["parameters"], alone["parameters"], strict=True))
    assert found["left"] == NOTHING


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what ``break_it`` replaces."""
    for owner, name in PLACES:
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("attach", [False, True], ids=["step", "attach"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=IDS)
def test_the_run_is_the_run_without_us(owner: type, name: str, attach: bool, tmp_path: Path) -> None:
    if attach and name in ("pause", "resume", "state_dict"):
        pytest.skip("attach calls it nowhere")
    found = run(tmp_path, owner=owner, name=name, attach=attach)
    assert_unharmed(found, run(None))
    assert len(found["told"]) == 1, found["told"]  # once, although it goes on raising
    told = found["told"][0]
    if owner is TensorBoardPanels:
        assert "panels" in told or "diagnostics are off" in told
    assert f"Injected: in {name}" in told and "training goes on" in told
    diagnostics = found["diagnostics"]
    if name not in ("finish", "close") and owner is not TensorBoardPanels:
        line = inspect.getsourcelines(break_it)[1] + 9
        assert f"{__file__}:{line}" in told  # where it was raised
        assert all(row.sight == "unseen" and "Injected" in row.reason for row in diagnostics.coverage)
        assert len(diagnostics.history["gradient/norm_applied" if attach else "gradient/norm"]) >= (
            1 if owner is History else AT - 1
        )
    for state in found["states"]:
        assert not state or state["step"] in range(1, STEPS + 1)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("owner", "name"), [(Capture, "open"), (Lane, "_launch"), (History, "append")])
def test_strict_raises(owner: type, name: str, tmp_path: Path) -> None:
    with pytest.raises(Injected):
        run(tmp_path, owner=owner, name=name, strict=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_kept(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise error

    model = gpt(layers=1)
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), terminal=False)
    monkeypatch.setattr(Capture, "open", interrupted)
    with pytest.raises(error):
        diagnostics.begin()
    monkeypatch.undo()
    diagnostics.finish()


@pytest.mark.usefixtures("restored")
def test_a_state_taken_while_it_is_off_resumes_at_the_right_step(tmp_path: Path) -> None:
    found = run(tmp_path, owner=Capture, name="open")
    state = found["states"][-1]
    assert state["step"] == STEPS
    model = gpt(layers=1)
    for taken, step in ((state, STEPS), ({}, 0)):
        again = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), terminal=False)
        again.load_state_dict(taken)
        assert again.step_count == step
        again.finish()


@pytest.mark.usefixtures("restored")
def test_where_nothing_can_be_said_the_run_goes_on_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def mute(self: Outlet, text: str) -> None:
        raise OSError("broken pipe")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outlet, "say", mute)
        found = run(tmp_path, owner=Capture, name="open")
    assert_unharmed(found, run(None))
    assert capfd.readouterr().err.count("Injected: in open") == 1


def test_a_loop_that_ends_by_an_exception_of_its_own_raises_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt(layers=1)
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), terminal=False)

    def broken(*_: Any, **__: Any) -> None:
        raise Injected("finish")

    monkeypatch.setattr(Outlet, "finish", broken)
    ours = pytest.warns(RuntimeWarning, match="Injected: finish")
    with ours, pytest.raises(FloatingPointError, match="theirs"), diagnostics.step():
        raise FloatingPointError("theirs")


class Unreadable(GradientMonitor):
    """Hands over states of the right size that cannot be packed: the message fails, not the monitor."""

    name = "unreadable"

    def __init__(self, bad: bool, device: str = "meta", shorter: int = 0) -> None:
        super().__init__()
        self.bad, self.device, self.shorter, self.calls = bad, device, shorter, 0

    def collect(self) -> Any:
        self.calls += 1
        groups = super().collect()
        if self.calls <= 2 or not self.bad:
            return groups
        return [
            Group(g.name, g.cells, {n: t.to(self.device)[self.shorter :] for n, t in g.sums.items()}) for g in groups
        ]


def test_a_state_of_the_wrong_size_is_the_fault_of_its_monitor() -> None:
    model = gpt(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Unreadable(True, "cpu", shorter=1)
    diagnostics = Diagnostics(model, optimizer, monitors=[monitor], terminal=False, max_overhead=None)
    with pytest.warns(RuntimeWarning, match="'unreadable' is switched off.*one number a cell, .10,") as told:
        for at in range(STEPS):
            with diagnostics.step() as step:
                step.loss(loss_of(model, batch(at))).backward()
                optimizer.step()
        diagnostics.finish()
    assert len(told) == 1
    assert len(diagnostics.history["loss/value"]) == STEPS  # everything else goes on


SCENARIOS: list[tuple[type, str, tuple[int, ...]]] = [
    (Capture, "open", (1,)),
    (Capture, "_enter", (0,)),
    (MonitorLane, "send", (1,)),
    (MonitorLane, "each", (0, 1)),
    (Unreadable, "collect", (1,)),
    (Judge, "hear", (0,)),
    (Outlet, "start", (0,)),
    (Outlet, "frame", (0,)),
]


def _on_ranks(rank: int, owner: type, name: str, ranks: tuple[int, ...], fast: bool) -> dict[str, Any]:
    """Two ranks that average their gradients; ours fails on some of them."""
    model: nn.Module = nn.parallel.DistributedDataParallel(gpt(layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    at = sent = before = 0
    monitors = [Unreadable(rank in ranks)] if owner is Unreadable else []
    diagnostics = Diagnostics(
        model, optimizer, every_n_steps=3, max_overhead=None, terminal=False, fast=fast, monitors=monitors
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if owner is not Unreadable and rank in ranks:
            patch.setattr(owner, name, getattr(owner, name))
            break_it(owner, name, lambda: at >= AT)
        reduce = dist.all_reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += 1
            return reduce(*args, **kwargs)

        patch.setattr(dist, "all_reduce", counting)
        for at in range(STEPS):
            with diagnostics.step() as step:
                loss = loss_of(model, batch(2 * at + rank))
                step.loss(loss).backward()
                step.gradients()
                optimizer.step()
                optimizer.zero_grad()
            before = sent if at == STEPS - 3 else before
        diagnostics.finish()
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "told": [str(w.message) for w in caught if "traindiag" in str(w.message)],
        "sent": sent,
        "late": sent - before,
        "left": leftovers(model, optimizer),
        "steps": diagnostics.step_count,
    }


def _all(rank: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """In one pair of processes, because to start one takes longer than all of these runs."""
    model: nn.Module = nn.parallel.DistributedDataParallel(gpt(layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for at in range(STEPS):
        loss_of(model, batch(2 * at + rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [_on_ranks(rank, *scenario, fast) for scenario in SCENARIOS for fast in (True, False)]
    return [p.detach().clone() for p in model.parameters()], found


def test_no_rank_hangs_and_all_end_together() -> None:
    (alone, first), (_, second) = run_on_ranks(_all)
    for i, (scenario, fast) in enumerate((s, fast) for s in SCENARIOS for fast in (True, False)):
        for result in (first[i], second[i]):
            what = (scenario, fast, result["told"])
            assert all(a.equal(b) for a, b in zip(result["parameters"], alone, strict=True)), what
            assert len(result["told"]) == 1, what
            assert "diagnostics are off" in result["told"][0] and "training goes on" in result["told"][0], what
            assert result["sent"] > 0 and result["late"] == 0, what  # in the end nobody sends any more
            assert result["left"] == NOTHING and result["steps"] == STEPS, what
        assert first[i]["sent"] == second[i]["sent"], what
