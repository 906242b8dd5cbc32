"""StabilityGap in a run: what it evaluates and when, shifts that are marked and found, and no trace of it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from traindiag import Diagnostics, StabilityGap, replay
from traindiag.engine.lanes import MonitorFault

INPUTS = torch.randn(96, 4, generator=torch.Generator().manual_seed(7))


def target(inputs: Tensor, sign: float = 1.0) -> Tensor:
    return sign * inputs.sum(1, keepdim=True).sin()


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets, reduction="sum"), len(inputs)


def old_task(batch: int = 40) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, target(INPUTS)), batch_size=batch, shuffle=True)


def gap(**settings: Any) -> StabilityGap:
    return StabilityGap({"old": old_task()}, loss, **{"higher_is_better": False, "every": 20, **settings})


class Run:
    """A regression with everything that an evaluation could disturb, which may turn to other targets."""

    def __init__(self, monitor: StabilityGap | None, dropout: float = 0.0, **settings: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.monitor = monitor
        monitors = [] if monitor is None else [monitor]
        options: dict[str, Any] = {"terminal": False, "strict": True, "default_monitors": False, "max_overhead": None}
        options |= settings
        self.diagnostics = Diagnostics(self.model, self.optimizer, monitors=monitors, **options)
        self.generator = torch.Generator().manual_seed(1)
        self.losses: list[Tensor] = []
        self.offset = 0.0

    def go(self, steps: int, sign: float = 1.0, before: Callable[[int], None] = lambda i: None) -> Run:
        for i in range(steps):
            before(i)
            with self.diagnostics.step() as step:
                inputs = torch.randn(64, 4, generator=self.generator)
                found = nn.functional.mse_loss(self.model(inputs), target(inputs, sign)) + self.offset
                step.loss(found).backward()
                step.gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(found.detach())
        return self

    def end(self) -> Run:
        self.diagnostics.finish()
        self.draws = [torch.rand(2), torch.tensor([random.random(), np.random.rand()])]
        return self

    def steps(self, signal: str) -> list[int]:
        history = self.diagnostics.history
        return history[f"stability/{signal}"].steps.tolist() if f"stability/{signal}" in history else []

    def left(self) -> list[Tensor]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        return [*self.losses, *(t.detach().clone() for t in (*tensors, *moments)), *self.draws]


@pytest.mark.parametrize("gradients", [False, True])
def test_the_run_is_the_same_bit_for_bit(gradients: bool) -> None:
    def turned(monitor: StabilityGap | None) -> Run:
        run = Run(monitor, dropout=0.3).go(60)
        if monitor is not None:
            monitor.mark_shift("sign")
        return run.go(30, -1.0).end()

    bare, watched = turned(None), turned(gap(gradients=gradients))
    assert all(a.equal(b) for a, b in zip(bare.left(), watched.left(), strict=True))
    assert all(m.training for m in watched.model.modules())
    assert len(watched.steps("loss")) > 30  # it did look


def test_it_evaluates_the_whole_task_in_evaluation_mode() -> None:
    run = Run(gap(), dropout=0.3).go(21).end()
    run.model.eval()
    with torch.no_grad():
        now = loss(run.model, (INPUTS, target(INPUTS)))[0] / len(INPUTS)
    assert run.diagnostics.history["stability/loss"].values[-1, 0] == pytest.approx(now.item(), rel=1e-6)
    assert run.steps("start") == [0] and run.steps("loss") == [0, 20]


def test_it_is_dense_after_a_shift_and_sparse_again() -> None:
    monitor = gap(every=100, detect=False)
    run = Run(monitor).go(205)
    monitor.mark_shift("sign")
    steps = run.go(650, -1.0).end().steps("loss")
    shift = 205
    expected = [0, 100, 200, *range(205, 255), *[shift + a for a in range(50, 551, 10)]]
    assert steps == sorted({*expected, *range(0, 855, 100)})
    assert run.steps("shift") == [shift]
    assert run.diagnostics.history["stability/shift"].cells.labels == ("sign",)


def reasons(run: Run) -> dict[int, set[str]]:
    series = run.diagnostics.history["stability/shift"]
    return {
        int(s): {series.cells.label(int(i)) for i in np.flatnonzero(series.seen[k])}
        for k, s in enumerate(series.steps)
    }


def test_a_loss_that_jumps_is_found_at_its_step_and_evaluated_from_the_next_one_on() -> None:
    run = Run(gap(every=1000)).go(200).go(20, -1.0).end()
    assert reasons(run) == {200: {"loss jumped"}}
    assert run.steps("loss") == [0, *range(201, 220)]
    alert = run.diagnostics.alerts[0]
    assert alert.diagnosis == "forgetting" and 200 < alert.step <= 206


def test_a_batch_that_stands_out_soon_after_a_shift_is_none() -> None:
    monitor = gap()
    run = Run(monitor).go(100)
    monitor.mark_shift("sign")
    run.go(137, -1.0)
    run.offset = 30.0
    run.go(1, -1.0)
    run.offset = 0.0
    run.go(20, -1.0).end()
    assert list(reasons(run)) == [100]
    assert monitor.continual.gaps["old"].shift == 100 and not monitor.continual.earlier


def test_a_jump_that_stirs_nothing_is_heard_at_once_too() -> None:
    run = Run(gap(every=1000))
    run.offset = 3.0  # no total doubles, so without the monitor these steps would wait for others
    run.go(203).go(20, -1.0).end()
    assert max(run.losses[203:206]) < 2 * min(run.losses[150:203])
    assert reasons(run) == {203: {"loss jumped"}}
    assert run.steps("loss") == [0, *range(204, 223)]


def test_a_learning_rate_that_doubles_and_an_optimizer_that_forgets_are_found() -> None:
    run = Run(gap(every=1000))

    def raise_it(i: int) -> None:
        if i == 63:
            run.optimizer.param_groups[0]["lr"] *= 2.5

    def reset(i: int) -> None:
        if i == 63:
            run.optimizer.state.clear()

    run.go(120, before=raise_it).go(120, before=reset).end()
    assert reasons(run) == {63: {"learning rate raised"}, 183: {"optimizer reset"}}
    assert {*range(64, 113), *range(184, 233)} <= set(run.steps("loss"))


def test_another_data_set_is_found_and_the_same_one_in_another_loader_is_not() -> None:
    run = Run(gap())
    first, second = (TensorDataset(INPUTS) for _ in range(2))
    run.diagnostics.data(DataLoader(first))
    run.go(40)
    run.diagnostics.data([DataLoader(first, batch_size=3)])
    run.go(40)
    run.diagnostics.data({"a": DataLoader(second)})
    assert reasons(run.go(5).end()) == {80: {"data changed"}}


def test_without_a_shift_there_is_neither_dense_evaluation_nor_alert() -> None:
    run = Run(gap()).go(400).end()
    assert run.steps("shift") == [] and run.steps("loss") == list(range(0, 400, 20))
    assert [a for a in run.diagnostics.alerts if a.family == "stability"] == []
    assert not any(name in run.diagnostics.history for name in ("stability/gap_depth", "stability/min_acc"))


def test_nothing_is_looked_for_where_shifts_are_only_marked() -> None:
    run = Run(gap(detect=False)).go(200).go(30, -1.0).end()
    assert run.steps("shift") == []


def test_a_run_that_begins_with_other_data_is_held_against_the_model_as_it_came() -> None:
    first = Run(None).go(300).end()
    monitor = gap()
    second = Run(monitor)
    second.model.load_state_dict(first.model.state_dict())
    monitor.mark_shift("another sign")
    second.go(30, -1.0).end()
    found = monitor.continual.gaps["old"]
    start = second.diagnostics.history["stability/start"].values[0, 0]
    assert found.baseline == pytest.approx(start) and start < 0.2 and found.depth > 0.3
    assert second.diagnostics.alerts[0].diagnosis == "forgetting"


def test_gradients_are_those_of_both_tasks() -> None:
    monitor = gap(gradients=True, detect=False)
    run = Run(monitor).go(60)
    twin = Run(None).go(60)  # without it, bit for bit the same
    inputs = torch.randn(64, 4, generator=twin.generator)
    nn.functional.mse_loss(twin.model(inputs), target(inputs, -1.0)).backward()
    new = torch.cat([p.grad.flatten() for p in twin.model.parameters() if p.grad is not None])
    twin.optimizer.step()
    twin.optimizer.zero_grad()
    twin.model.eval()
    (loss(twin.model, (INPUTS, target(INPUTS)))[0] / len(INPUTS)).backward()
    old = torch.cat([p.grad.flatten() for p in twin.model.parameters() if p.grad is not None])
    monitor.mark_shift("sign")
    run.go(30, -1.0).end()
    assert run.steps("gradient_ratio") == [60, 62, 65, 80]
    history = run.diagnostics.history
    ratio, cosine = (history[f"stability/gradient_{n}"].values[0, 0] for n in ("ratio", "cosine"))
    assert ratio == pytest.approx((new.norm() / old.norm()).item(), rel=1e-4)
    assert cosine == pytest.approx(torch.cosine_similarity(new, old, dim=0).item(), rel=1e-3)


def test_an_interrupted_run_is_told_what_an_unbroken_one_is(tmp_path: Path) -> None:
    def turn(monitor: StabilityGap) -> None:
        monitor.mark_shift("sign")

    whole_monitor = gap()
    whole = Run(whole_monitor).go(150)
    turn(whole_monitor)
    whole.go(40, -1.0).end()
    for cut in (100, 152, 170):
        first, second = gap(), gap()
        before = Run(first).go(min(cut, 150))
        if cut > 150:
            turn(first)
            before.go(cut - 150, -1.0)
        torch.save(before.diagnostics.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        model, optimizer = before.model.state_dict(), before.optimizer.state_dict()
        after = Run(second)
        after.model.load_state_dict(model)
        after.optimizer.load_state_dict(optimizer)
        after.generator.set_state(before.generator.get_state())
        after.diagnostics.load_state_dict(state)
        if cut < 150:
            after.go(150 - cut)
            turn(second)
        after.go(190 - max(cut, 150), -1.0).end()

        def told(run: Run) -> list[Any]:
            return [(a.step, a.status, a.severity, a.diagnosis, a.evidence) for a in run.diagnostics.alerts]

        assert told(after) == told(whole) != []
        assert second.continual.state_dict() == whole_monitor.continual.state_dict()
        held, cutted = whole.steps("loss"), before.steps("loss")
        assert [s for s in cutted if s < cut] + after.steps("loss") == held


def test_other_samples_than_in_the_checkpoint_are_told_and_begin_anew() -> None:
    before = Run(gap()).go(50)
    state = before.diagnostics.state_dict()
    moved = DataLoader(TensorDataset(INPUTS + 1, target(INPUTS)), batch_size=40)
    other = StabilityGap({"old": moved}, loss, higher_is_better=False, every=20)
    run = Run(other)
    with pytest.warns(RuntimeWarning, match="held-out samples of task 'old' are others than in the checkpoint"):
        run.diagnostics.load_state_dict(state)
    assert not other.continual.courses["old"].values


# -- samples -------------------------------------------------------------------------------------


def test_samples_are_drawn_once_and_without_a_trace() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(INPUTS, target(INPUTS)), batch_size=8, shuffle=True, generator=generator)
    states = torch.get_rng_state(), generator.get_state()
    monitor = StabilityGap({"old": loader}, loss, higher_is_better=False, every=1, samples=30)
    run = Run(monitor).go(3)
    held = monitor._held_out["old"]
    assert [len(b[0]) for b in held.batches] == [8, 8, 8, 6]
    assert generator.get_state().equal(states[1])
    kept = [t.clone() for b in held.batches for t in b]
    run.go(3).end()
    assert all(a.equal(b) for a, b in zip(kept, (t for b in held.batches for t in b)))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for x in INPUTS:
            yield x, target(x[None])[0]


def test_streams_give_their_first_samples() -> None:
    monitor = StabilityGap({"old": DataLoader(Stream(), batch_size=16)}, loss, higher_is_better=False, samples=40)
    watched = Run(None).diagnostics.watched
    before = torch.get_rng_state()
    monitor.prepare(watched)
    assert sum(len(b[0]) for b in monitor._held_out["old"].batches) == 48  # batches are not split
    assert before.equal(torch.get_rng_state())  # iterating a loader draws from the global generator


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"tasks": {}}, ValueError, "tasks must name at least one held-out loader, got none"),
        ({"tasks": [old_task()]}, TypeError, "tasks must map the name of a task to its held-out loader"),
        ({"tasks": {"old": []}}, ValueError, "the loader of task 'old' holds no batch"),
        ({"tasks": {"old": 3}}, TypeError, r"tasks\['old'\] must be a loader or another iterable of batches, got 3"),
        ({"tasks": {3: old_task()}}, TypeError, "the name of a task must be a text, got 3"),
        ({"metric": None}, TypeError, r"metric must be a function of \(model, batch\)"),
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"samples": 1.5}, ValueError, "samples must be an integer of at least 1, got 1.5"),
        ({"current": "new"}, ValueError, "current must be one of 'old' or None, got 'new'"),
        ({"gradients": "yes"}, TypeError, "gradients must be a bool, or a function as metric is, got 'yes'"),
        ({"gradients": True, "higher_is_better": True}, ValueError, "pass gradients=loss"),
    ],
)
def test_wrong_arguments_are_told_at_once(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"tasks": {"old": old_task()}, "metric": loss, "higher_is_better": False, **settings}
    with pytest.raises(error, match=words):
        StabilityGap(**given)


def test_a_stream_without_a_sample_is_told_before_the_run() -> None:
    monitor = StabilityGap({"old": iter(())}, loss, higher_is_better=False)
    with pytest.raises(ValueError, match="the loader of task 'old' holds no batch"):
        Run(monitor)


def test_marks_are_checked() -> None:
    monitor = gap()
    with pytest.raises(TypeError, match="reason must be a text, got 3"):
        monitor.mark_shift(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reason must say what has changed"):
        monitor.mark_shift(" ")
    with pytest.raises(ValueError, match="task must be one of 'old' or None, got 'new'"):
        monitor.mark_shift("x", task="new")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.ones(3), r"metric must give \(sum, count\) of a batch of task 'old', got a tensor of shape \(3,\)"),
        (1.0, r"metric must give \(sum, count\) of a batch of task 'old', got 1.0"),
        ((torch.ones(3), 3), r"two numbers; got a tensor of shape \(3,\) for the sum"),
        ((1.0, "many"), "two numbers; got 'many' for the count"),
        ((1.0, 0), "with a positive count, got 0.0"),
        ((1.0, float("nan")), "with a positive count, got nan"),
    ],
)
def test_a_metric_that_gives_no_pair_ends_the_monitor_and_not_the_run(found: Any, words: str) -> None:
    monitor = StabilityGap({"old": old_task()}, lambda model, batch: found, higher_is_better=False)
    with pytest.raises(MonitorFault, match=words):
        Run(monitor).go(1)
    monitor = StabilityGap({"old": old_task()}, lambda model, batch: found, higher_is_better=False)
    with pytest.warns(RuntimeWarning, match="monitor 'stability_gap' is switched off on all ranks"):
        run = Run(monitor, strict=False).go(30).end()
    assert len(run.losses) == 30 and run.steps("loss") == []


def test_nan_is_told_as_nan_and_makes_no_gap() -> None:
    def broken(model: nn.Module, batch: Any) -> tuple[float, int]:
        return float("nan"), 4

    monitor = StabilityGap({"old": old_task()}, broken, higher_is_better=False, every=10)
    run = Run(monitor).go(40)
    monitor.mark_shift("sign")
    run.go(20).end()
    assert np.isnan(run.diagnostics.history["stability/loss"].values).all()
    assert not monitor.continual.gaps
    bad = run.diagnostics.alerts[0]
    assert (bad.rule, bad.signal, bad.where) == ("nonfinite", "stability/loss", "old")


def test_gradients_of_what_has_none_are_refused() -> None:
    def hits(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        inputs, targets = batch
        return (model(inputs).sign() == targets.sign()).sum(), len(inputs)

    monitor = StabilityGap({"old": old_task()}, hits, higher_is_better=True, gradients=hits)
    run = Run(monitor).go(5)
    monitor.mark_shift("sign")
    with pytest.raises(MonitorFault, match="gradients need a metric whose sum can be differentiated"):
        run.go(1)
    monitor = StabilityGap({"old": old_task()}, hits, higher_is_better=True, gradients=loss)
    run = Run(monitor).go(5)
    monitor.mark_shift("sign")
    assert run.go(10, -1.0).end().steps("gradient_cosine") == [5, 7, 10]
    assert run.steps("value") and not run.steps("loss")


def test_a_second_run_with_the_same_monitor_begins_anew() -> None:
    monitor = gap()
    Run(monitor).go(60).go(30, -1.0).end()
    monitor.mark_shift("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run(monitor).go(10, -1.0).end()
    assert reasons(run) == {0: {"second"}}
    assert run.steps("loss") == list(range(10))


def test_the_log_tells_again_what_was_told(tmp_path: Path) -> None:
    monitor = gap()
    run = Run(monitor, log_dir=tmp_path).go(100).go(20, -1.0)
    monitor.mark_shift("back")
    live = run.go(30).end().diagnostics.alerts
    (replayed,) = replay(tmp_path).runs
    assert [a.to_dict() for a in replayed.alerts] == [a.to_dict() for a in live]
    assert {a.status for a in live} >= {"opened", "closed"}
