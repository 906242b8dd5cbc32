"""What a run was told, its log tells again: every field of every alert, on real runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.test_wiring_alerts import LAME, gpt, plain
from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from tests.lightning_runs.test_injected_faults import Inject
from tests.lightning_runs.test_resume import Kill
from tests.ranks import run_on_ranks
from traindiag import Alert, Diagnostics, Frame, Rule, Threshold, TrainingDiagnostics, Verdict, replay
from traindiag.playback.replay import ReplayedRun
from traindiag.rules.default_pack import default_rules


def as_text(alerts: Sequence[Alert]) -> list[str]:
    return [json.dumps(a.to_dict(), sort_keys=True) for a in alerts]


def only(folder: Path, rules: Sequence[Rule] | None = None) -> ReplayedRun:
    (run,) = replay(folder, rules).runs
    return run


def same(live: Sequence[Alert], folder: Path, rules: Sequence[Rule] | None = None) -> ReplayedRun:
    """Replays, and compares all fields with what was told live and with what the log says was told."""
    run = only(folder, rules)
    assert as_text(run.alerts) == as_text(live)
    assert run.told is not None and as_text(run.told) == as_text(live)
    assert run.notes == ()
    return run


def train(folder: Path, *, lr: float = 1e-3, steps: int = 30, loss: Any = plain, **keywords: Any) -> list[Alert]:
    """The demo's model in a loop of one's own."""
    torch.set_num_threads(1)
    model = keywords.pop("model", None) or gpt()
    optimizer = keywords.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), lr=lr)
    after: Callable[[int], None] = keywords.pop("after", lambda i: None)
    settings = {"every_n_steps": 2, "max_overhead": None, "terminal": False, "strict": True, **keywords}
    diagnostics = Diagnostics(model, optimizer, folder, **settings)
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        with diagnostics.step() as step:
            tokens = torch.randint(0, 64, (2, 17), generator=generator)
            step.loss(loss(model, tokens)).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
            after(i)
    diagnostics.finish()
    return diagnostics.alerts


def test_an_unstable_run(tmp_path: Path) -> None:
    live = train(tmp_path, lr=0.5, steps=160, every_n_steps=5)
    assert {a.rule for a in live if a.severity != "info"} & {
        "attention/logit-range",
        "attention/logit-range-to-damage",
    }
    assert any(a.status == "escalated" for a in live)
    run = same(live, tmp_path)
    assert (run.steps, run.last, run.run.model) == (160, 159, "GPT")


@pytest.mark.parametrize("step", [0, 9, 17])
def test_a_nan(tmp_path: Path, step: int) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([Inject(step, "nan"), diagnostics], steps=45, folder=tmp_path, logger=None)
    assert any(a.rule == "nonfinite" for a in diagnostics.alerts)
    same(diagnostics.alerts, tmp_path)


def test_a_nan_in_two_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([Inject(9, "nan"), diagnostics], steps=12, manual=True, folder=tmp_path, logger=None)
    assert any(a.rule == "nonfinite" for a in diagnostics.alerts)
    same(diagnostics.alerts, tmp_path)


class Reads(Rule):
    """Tells all that a frame holds beside its readings, at every frame."""

    signals = ()
    name = "reads"

    def update(self, frame: Frame) -> list[Verdict]:
        text = repr(
            (
                *(frame.lane, list(frame.readings), frame.time, frame.seconds_per_step, dict(frame.updates)),
                *(dict(frame.learning_rates), frame.segment, frame.run.heads, frame.run.batch_size),
            )
        )
        active = frame.step % 2 == 0
        return [Verdict(self.name, "all", "loss/value", frame.step, active, evidence=text, cooldown=0)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def rules() -> list[Rule]:
    return [
        Reads(),
        Threshold("loss/value", below=5.0, persistence=3, cooldown=4, name="loss-low", severity="info"),
        Threshold("attention/max_logit", above=5.0, persistence=2, name="logit"),
        Threshold("loss/value", above=5.3, cooldown=1, name="loss-high", severity="info"),
    ]


def test_a_killed_and_resumed_run_with_steps_that_were_rolled_back(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(callbacks: list[Any], ckpt_path: str | None = None) -> None:
        torch.manual_seed(0)
        trace = Trace()
        fit(
            callbacks,
            module=Automatic(DropoutGPT(qk_scale=3.0), trace, lr=1e-2),
            trace=trace,
            steps=24,
            ckpt_path=ckpt_path,
            folder=tmp_path,
            validation=False,
            enable_checkpointing=True,
            logger=None,
        )

    def diagnostics() -> TrainingDiagnostics:
        return TrainingDiagnostics(
            rules=rules(), default_rules=False, every_n_steps=3, max_overhead=None, terminal=False
        )

    first = diagnostics()
    save = ModelCheckpoint(dirpath=tmp_path, filename="at-{step}", every_n_train_steps=12, save_top_k=-1)
    with contextlib.suppress(SystemExit):
        run([first, save, Kill()])
    second = diagnostics()
    run([second], str(tmp_path / "at-step=12.ckpt"))
    assert {a.segment for a in second.alerts} == {0, 1}
    replayed = same(second.alerts, tmp_path, rules())
    assert replayed.steps == 24  # 12, 13 and 14 count once
    assert replayed.history["loss/value"].segments.tolist() == 12 * [0] + 12 * [1]


@pytest.mark.parametrize("kind", ["owners", "ungraded", "unchanged"])
def test_faults_of_wiring(tmp_path: Path, kind: str) -> None:
    model = gpt()
    named = dict(model.named_parameters())
    lame = named.pop(LAME)
    groups: list[Any] = [{"params": list(named.values())}]
    if kind != "owners":
        groups.append({"params": [lame], "lr": 0.0 if kind == "unchanged" else 1e-3})
    if kind == "ungraded":
        layer = model.blocks[1].mlp[2]
        layer.forward = lambda x: nn.functional.linear(x, layer.weight.detach())
    live = train(tmp_path, model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3))
    assert f"wiring/{kind}" in {a.rule for a in live}
    same(live, tmp_path)


def test_a_rule_finds_everything_in_a_frame_that_it_found_live(tmp_path: Path) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    live = train(
        tmp_path,
        model=model,
        optimizer=optimizer,
        after=lambda i: schedule.step(),
        rules=[Reads()],
        default_rules=False,
        steps=70,
        every_n_steps=4,
    )
    assert len(live) > 60
    assert "{'AdamW': 3}, {'AdamW': 0.081" in live[2].evidence  # updates and learning rate of step 2
    same(live, tmp_path, [Reads()])


def everywhere() -> list[Rule]:
    heads = [f"*blocks.{layer}*head {head}" for layer in range(2) for head in range(2)]
    return [
        *(Threshold("attention/max_logit", above=-1e9, where=head) for head in heads),
        *(Threshold("activation/max", above=0.0, where=f"*blocks.{layer}") for layer in range(2)),
        Threshold("output/logit_max", above=-1e9),
        Threshold("output/logit_min", below=1e9),
    ]


def _two_ranks(rank: int, folder: str) -> Any:
    torch.manual_seed(0)
    model = gpt()
    wrapped = nn.parallel.DistributedDataParallel(model)

    def loss(m: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return plain(m, (tokens + 7 * rank) % 64)

    live = train(Path(folder), model=wrapped, loss=loss, rules=everywhere(), steps=12)
    return as_text(live), [a.rank for a in live]


def test_the_rank_that_a_value_came_from(tmp_path: Path) -> None:
    (live, ranks), _ = run_on_ranks(_two_ranks, str(tmp_path))
    assert 1 in ranks
    assert as_text(only(tmp_path, [*default_rules(), *everywhere()]).alerts) == live


def test_a_run_that_was_killed_is_judged_as_far_as_its_log_goes(tmp_path: Path) -> None:
    live = train(tmp_path, lr=0.5, steps=160, every_n_steps=5)
    (file,) = tmp_path.glob("*tfevents*")
    whole = file.read_bytes()
    for share in (0.3, 0.6, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        run = only(tmp_path)
        assert any("incomplete" in note for note in run.notes)
        assert 0 < run.last < 159
        before = [a for a in live if a.step <= run.last - 50]  # what the fast lane had not written yet is lost
        assert [(a.id, a.status) for a in run.alerts][: len(before)] == [(a.id, a.status) for a in before]
    file.write_bytes(whole)
    assert as_text(only(tmp_path).alerts) == as_text(live)
