"""What alerts make the engine do: at the end of the step, after the same one on all ranks, once or twice an event."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from tests.ranks import run_on_ranks
from traindiag import Alert, Call, Diagnostics, Raise, SaveCheckpoint, StopTraining, Threshold, TrainingAlert
from traindiag.alerts.jsonl import read_alerts
from traindiag.engine.judge import BATCH, Judge
from traindiag.record.log import read_log
from traindiag.rules.rule import SEVERITIES, Verdict


def number(step: int) -> float:
    """Past the limit at step 3, far past it from step 6 on."""
    return 0.0 if step < 3 else 2.0 if step < 6 else 20.0


class Loop:
    """A loop of one's own, with a log of what happened in it."""

    def __init__(self, folder: Path | None = None, **settings: Any) -> None:
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        rule = Threshold("user/number", above=1.0, critical_above=10.0, name="number")
        settings = {"rules": [rule], "default_rules": False, "terminal": False, **settings}
        self.diagnostics = Diagnostics(self.model, self.optimizer, folder, **settings)
        self.ended: list[int] = []

    def train(self, steps: int, numbers: Any = number) -> None:
        for _ in range(steps):
            at = self.diagnostics.step_count
            with self.diagnostics.step() as step:
                step.loss(self.model(torch.ones(2, 4)).square().mean()).backward()
                self.diagnostics.log("user/number", numbers(at))
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.ended.append(at)
            if self.diagnostics.should_stop:
                return


def test_stops_at_the_end_of_the_step_that_brought_it_up() -> None:
    loop = Loop(actions=[StopTraining(severity="critical")])
    with pytest.warns(RuntimeWarning, match="training stops after step 7, as an action asks for"):
        loop.train(20)
    assert loop.ended[-1] == 7  # step 6 is judged at the end of step 7
    assert loop.diagnostics.should_stop
    loop.diagnostics.finish()


class Graded(Threshold):
    """Speaks as loudly as the number is large, so that an event can get worse twice."""

    def _verdict(self, *args: Any, **kwargs: Any) -> Verdict:
        verdict = super()._verdict(*args, **kwargs)
        loud = min(int(verdict.value), 3) - 1
        return replace(verdict, severity=SEVERITIES[loud]) if verdict.active else verdict


def test_two_checkpoints_an_event_however_often_it_gets_worse() -> None:
    names: list[str] = []
    rule = Graded("user/number", above=0.5, cooldown=2, name="a number")
    loop = Loop(rules=[rule], actions=[SaveCheckpoint(names.append, severity="info")])
    numbers = [0, 1, 1, 2, 0, 3, 1, 3, 3, 3, 0, 0, 0, 0, 1, 1, 3, 3]
    loop.train(len(numbers), lambda at: numbers[at])
    loop.diagnostics.finish()
    told = [(a.status, a.severity) for a in loop.diagnostics.alerts]
    assert told[:3] == [("opened", "info"), ("escalated", "warning"), ("escalated", "critical")]
    assert names == [
        "step-2-a-number-opened", "step-4-a-number-escalated", "step-15-a-number-opened", "step-17-a-number-escalated"
    ]  # fmt: skip


def test_events_of_one_step_share_a_checkpoint() -> None:
    names: list[str] = []
    rules = [Threshold("user/number", above=1.0, name="one"), Threshold("user/number", above=1.5, name="other")]
    loop = Loop(rules=rules, actions=[SaveCheckpoint(names.append), SaveCheckpoint(names.append, clock="slow")])
    loop.train(9)
    loop.diagnostics.finish()
    assert names == ["step-4-one-opened"]


def test_what_was_saved_goes_on_as_if_nothing_had_been() -> None:
    """The state in a checkpoint knows of that checkpoint, and of what is still to be done."""
    kept: dict[str, Any] = {}
    loop = Loop()
    loop.diagnostics = Diagnostics(
        loop.model,
        loop.optimizer,
        rules=[Threshold("user/number", above=1.0, critical_above=10.0, name="number")],
        actions=[SaveCheckpoint(lambda name: kept.update({name: loop.diagnostics.state_dict()}))],
        default_rules=False,
        terminal=False,
    )
    loop.train(9)
    loop.diagnostics.finish()
    assert list(kept) == ["step-4-number-opened", "step-7-number-escalated"]
    again: list[str] = []
    resumed = Loop(actions=[SaveCheckpoint(again.append)])
    resumed.diagnostics.load_state_dict(kept["step-4-number-opened"])
    resumed.train(5)
    resumed.diagnostics.finish()
    assert again == ["step-7-number-escalated"]


def test_the_second_checkpoint_of_an_event_is_its_last_in_a_resumed_job_too() -> None:
    def rule() -> Threshold:
        return Graded("user/number", above=0.5, cooldown=2, name="number")

    numbers = [1, 2, 2, 2, 3, 3, 0, 0, 0, 0, 0]
    first = Loop(rules=[rule()], actions=[SaveCheckpoint(lambda name: None, severity="info")])
    first.train(4, lambda at: numbers[at])
    state = first.diagnostics.state_dict()
    first.diagnostics.finish()
    names: list[str] = []
    second = Loop(rules=[rule()], actions=[SaveCheckpoint(names.append, severity="info")])
    second.diagnostics.load_state_dict(state)
    second.train(7, lambda at: numbers[at])
    told = [(a.status, a.severity) for a in second.diagnostics.alerts]
    assert told[1:3] == [("escalated", "warning"), ("escalated", "critical")] and names == []
    assert told[-1][0] == "closed" and second.diagnostics.state_dict()["decisions"]["saved"] == []  # and forgotten
    second.diagnostics.finish()


def test_what_is_to_be_done_is_in_the_checkpoint() -> None:
    first = Loop(actions=[StopTraining(severity="critical")])
    first.train(7)  # step 6 has not been judged; the state judges it
    state = first.diagnostics.state_dict()
    first.diagnostics.finish(failed=True)
    assert not first.diagnostics.should_stop
    second = Loop(actions=[StopTraining(severity="critical")])
    second.diagnostics.load_state_dict(torch.load(_saved(state), weights_only=True))
    with pytest.warns(RuntimeWarning, match="training stops after step 7"):
        second.train(20)
    second.diagnostics.finish()
    assert second.ended == [7]


def _saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_checkpoint_that_cannot_be_saved_costs_nothing() -> None:
    def full(name: str) -> None:
        raise OSError("no space left on device")

    loop = Loop(actions=[SaveCheckpoint(full, status=["opened"])])
    with pytest.warns(RuntimeWarning, match="'step-4-number-opened' was not saved: OSError: no space left on device"):
        loop.train(9)
    loop.diagnostics.finish()
    assert len(loop.ended) == 9


def test_own_loop_has_to_say_how_to_save() -> None:
    with pytest.raises(ValueError, match=r"SaveCheckpoint\(\) does not know how to save in a loop of your"):
        Loop(actions=[SaveCheckpoint()])


def test_raises_when_everything_is_written_and_leaves_nothing(tmp_path: Path) -> None:
    order: list[str] = []
    actions = [
        Raise(severity="critical"),
        StopTraining(severity="critical"),
        SaveCheckpoint(order.append, severity="critical"),
        Call(lambda alert: order.append("called"), severity="critical"),
    ]
    loop = Loop(tmp_path, actions=actions)
    with pytest.warns(RuntimeWarning, match="training stops"), pytest.raises(TrainingAlert) as error:
        loop.train(20, lambda at: 0.0 if at < 6 else 20.0)
    assert order == ["called", "step-7-number-opened"]
    assert (error.value.alert.rule, error.value.alert.step, loop.ended[-1]) == ("number", 6, 6)
    assert leftovers(loop.model, loop.optimizer) == NOTHING
    told = loop.diagnostics.alerts
    assert error.value.alert in told
    assert [a.id for a in read_alerts(tmp_path / "traindiag" / "alerts.jsonl")] == [a.id for a in told]
    log = read_log(tmp_path)
    assert log.history["user/number"].steps.tolist() == list(range(8))  # the step that was under way included


def test_raises_in_a_loop_that_is_not_ours() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = Threshold("gradient/norm_applied", above=0.0, name="always")
    diagnostics = Diagnostics.attach(model, optimizer, rules=[rule], actions=[Raise()], terminal=False)

    def one_step() -> None:
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()

    one_step()
    with pytest.raises(TrainingAlert):
        one_step()
    assert leftovers(model, optimizer) == NOTHING
    assert [a.rule for a in diagnostics.alerts if a.rule == "always"] == ["always"]


def test_an_alert_of_the_last_step_is_raised_by_the_end() -> None:
    loop = Loop(actions=[Raise()])
    loop.train(4)
    with pytest.raises(TrainingAlert):
        loop.diagnostics.finish()
    assert leftovers(loop.model, loop.optimizer) == NOTHING
    loop.diagnostics.finish()  # once


def test_a_function_that_fails_is_told_once_and_the_others_are_called() -> None:
    called: list[Alert] = []

    def fails(alert: Alert) -> None:
        raise ZeroDivisionError

    loop = Loop(actions=[fails, called.append])
    with pytest.warns(RuntimeWarning, match="action .*fails.* failed and is not called again: ZeroDivisionError"):
        loop.train(9)
    loop.diagnostics.finish()
    assert [a.status for a in called] == ["opened", "escalated"]


def test_severity_of_a_default_rule_is_the_one_asked_for() -> None:
    seen = {}
    for severity in ({}, {"nonfinite": "info"}):
        loop = Loop(severity=severity, actions=[StopTraining()], default_rules=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.train(6, lambda at: float("nan") if at == 2 else 0.0)
        loop.diagnostics.finish()
        told = [a.severity for a in loop.diagnostics.alerts if a.rule == "nonfinite"]
        seen[bool(severity)] = (loop.ended[-1], told)
    assert seen[False][0] == 3 and "info" not in seen[False][1]
    assert seen[True][0] == 5 and set(seen[True][1]) == {"info"}


def test_silenced_rule_is_quiet_and_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "the reward is NaN before the first episode ends"
    loop = Loop(tmp_path, silence={"nonfinite": reason}, terminal=True)
    loop.train(4, lambda at: float("nan"))
    loop.diagnostics.finish()
    assert loop.diagnostics.alerts == []
    assert f"silenced: nonfinite ({reason})" in capsys.readouterr().err
    run = read_log(tmp_path).run
    assert run is not None and run.silenced == {"nonfinite": reason}


def _stop(rank: int, early: bool, calm: bool) -> dict[str, Any]:
    """The first rank looks at its alerts in every step: it hears of calm steps before the other one does."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    saved: list[str] = []
    rule = Threshold("user/number", above=1.0, name="number")
    rule.patient = calm
    diagnostics = Diagnostics(
        model,
        optimizer,
        rules=[rule],
        default_rules=False,
        actions=[StopTraining(), SaveCheckpoint(saved.append), Raise(diagnosis="nothing")],
        every_n_steps=100,
        terminal=False,
    )
    ended = -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(60):
            with diagnostics.step() as step:
                step.loss(model(torch.ones(2, 4)).square().mean()).backward()
                diagnostics.log("user/number", 0.9 if at < 10 else 1.1)
                optimizer.step()
                optimizer.zero_grad()
                if early and rank == 0:
                    _ = diagnostics.alerts
            ended = at
            if diagnostics.should_stop:
                break
        diagnostics.finish()
    return {"ended": ended, "saved": saved, "alerts": [(a.id, a.step) for a in diagnostics.alerts]}


@pytest.mark.parametrize("early", [False, True], ids=["alike", "one looks"])
@pytest.mark.parametrize("calm", [False, True], ids=["at once", "calm"])
def test_two_ranks_stop_after_the_same_step(early: bool, calm: bool) -> None:
    one, other = run_on_ranks(_stop, early, calm)
    assert one == other
    assert one["alerts"] and one["alerts"][0][1] == 10
    assert one["ended"] == 12 + (BATCH if calm else 0)
    assert one["saved"] == [f"step-{one['ended']}-number-opened"]


def _fails(rank: int) -> dict[str, Any]:
    """One rank cannot judge the step for which the other one wants to stop."""
    if rank == 1:
        hear = Judge.hear

        def broken(self: Judge, frame: Any) -> Any:
            if frame.step >= 10:
                raise ZeroDivisionError("injected")
            return hear(self, frame)

        Judge.hear = broken  # type: ignore[method-assign]
    return _stop(rank, False, False)


def test_a_rank_that_fails_does_not_wait_for_one_that_stops() -> None:
    one, other = run_on_ranks(_fails)
    assert one["ended"] == other["ended"] == 59
    assert one["saved"] == other["saved"] == []
