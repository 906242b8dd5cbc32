"""A killed and resumed run is one run; a state that cannot be read is told, and training goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_runs.run import Trace, llama, train, transformers
from traindiag import HFTrainingDiagnostics, Threshold

STEPS, SAVED, KILLED = 24, 12, 15


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            raise KeyboardInterrupt


def diagnostics() -> HFTrainingDiagnostics:
    rules = [
        Threshold("loss/value", below=5.3, persistence=3, name="loss-low", severity="info"),
        Threshold("attention/max_logit", above=2.0, persistence=2, name="logit", severity="warning"),
        Threshold("loss/value", above=5.45, name="loss-high", severity="info"),
    ]
    return HFTrainingDiagnostics(rules=rules, every_n_steps=3, max_overhead=None, terminal=False)


def run(folder: Path, callbacks: list[Any], **options: Any) -> Trace:
    return train(
        llama(qk_scale=4.0), callbacks, folder, steps=STEPS, save_strategy="steps", save_steps=SAVED, **options
    )


def comparable(alerts: list[Any]) -> list[tuple[Any, ...]]:
    return [(a.rule, a.status, a.step, a.where, a.value, a.severity) for a in alerts]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HFTrainingDiagnostics]:
    folder = tmp_path_factory.mktemp("killed")
    first = diagnostics()
    with pytest.raises(KeyboardInterrupt):
        run(folder, [first, Kill()])
    first.detach()
    return folder, first


@pytest.mark.parametrize("named", ["by the Trainer", "by path", "elsewhere"])
def test_resumed_run_gives_the_alerts_of_an_unbroken_one(
    named: str, killed: tuple[Path, HFTrainingDiagnostics], tmp_path: Path
) -> None:
    unbroken = diagnostics()
    whole = run(tmp_path / "unbroken", [unbroken])
    assert len({a.rule for a in unbroken.alerts}) >= 3  # there is something to lose

    folder, first = killed
    if named == "elsewhere":  # the checkpoint tells nothing of where it was made
        shutil.copytree(folder / f"checkpoint-{SAVED}", tmp_path / "moved" / "best")
        folder, checkpoint = tmp_path / "output", str(tmp_path / "moved" / "best")
    else:
        shutil.copytree(folder, tmp_path / "output")
        folder = tmp_path / "output"
        checkpoint = folder / f"checkpoint-{SAVED}" if named == "by path" else True  # type: ignore[assignment]
    second = diagnostics()
    resumed = run(folder, [second], resume=checkpoint)
    assert all(a.equal(b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))

    told = {(a.id, a.status): a for a in first.alerts + second.alerts}
    assert comparable(sorted(told.values(), key=lambda a: a.step)) == comparable(unbroken.alerts)
    assert {a.run for a in told.values()} == {first.alerts[0].run}  # one run id over both jobs
    assert second.history["loss/value"].steps[0] == SAVED


def test_the_state_in_a_checkpoint_is_plain_data(killed: tuple[Path, HFTrainingDiagnostics]) -> None:
    folder, _ = killed
    state = torch.load(folder / f"checkpoint-{SAVED}" / "traindiag.pt", weights_only=True)
    assert state["step"] == SAVED
    json.dumps(state)  # nothing but numbers, strings, lists and dicts
    assert not list(folder.rglob("*.tmp"))


def test_a_run_that_is_not_resumed_looks_at_no_checkpoint(
    killed: tuple[Path, HFTrainingDiagnostics], tmp_path: Path
) -> None:
    shutil.copytree(killed[0], tmp_path / "output")
    again = diagnostics()
    run(tmp_path / "output", [again])
    assert again.history["loss/value"].steps[0] == 0
    assert again.alerts[0].run != killed[1].alerts[0].run


def damaged(kind: str, file: Path) -> None:
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif kind == "no file of torch":
        file.write_text("hello")
    elif kind == "something else":
        torch.save(torch.ones(2), file)
    elif kind == "foreign":
        torch.save({"step": 3}, file)
    else:
        torch.save({**torch.load(file, weights_only=True), "version": 99}, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"checkpoint-12/traindiag\.pt does not exist"),
        ("cut", r"traindiag\.pt cannot be read"),
        ("no file of torch", r"traindiag\.pt cannot be read"),
        ("something else", r"expected to hold a dict, got Tensor"),
        ("foreign", r"is not one of traindiag: KeyError: 'version'"),
        ("newer", r"state of version 99; this package knows \d+\. Update traindiag"),
    ],
)
def test_a_state_that_cannot_be_used_is_told(
    kind: str,
    message: str,
    killed: tuple[Path, HFTrainingDiagnostics],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "output"
    shutil.copytree(killed[0], folder)
    damaged(kind, folder / f"checkpoint-{SAVED}" / "traindiag.pt")
    late = HFTrainingDiagnostics(every_n_steps=3)
    resumed = run(folder, [late], resume=True)
    assert len(resumed.losses) == STEPS - SAVED  # training went on
    assert late.history["loss/value"].steps.tolist() == list(range(STEPS - SAVED))
    told = " ".join(capsys.readouterr().err.split())
    assert "this job begins a new run of diagnostics" in told
    assert re.search(message.replace(r"\.", r"\.\s?").replace("/", r"/\s?"), told), told


def test_a_checkpoint_that_cannot_be_written_to_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Move(transformers.TrainerCallback):  # type: ignore[misc]
        """Takes the checkpoint away at once, as some who upload them do."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    watching = HFTrainingDiagnostics()
    trace = run(tmp_path, [Move(), watching])
    assert len(trace.losses) == STEPS and len(watching.history["loss/value"]) == STEPS
    assert "the checkpoint holds no state of diagnostics" in " ".join(capsys.readouterr().err.split())
