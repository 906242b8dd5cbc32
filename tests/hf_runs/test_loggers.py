"""Whatever the Trainer logs to keeps every point of its own; ours ride along, and the record is beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.hf_runs.run import Trace, llama, train, transformers
from tests.lightning_runs.test_loggers import wandb_points
from traindiag import HFTrainingDiagnostics, Threshold
from traindiag.adapters.transformers_logs import Passengers
from traindiag.record.log import read_log

OPTIONS: dict[str, Any] = {"steps": 20, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 10}


class Mine(transformers.TrainerCallback):  # type: ignore[misc]
    """Logs a number of the user's own straight to wandb, at a step of its own, and reads what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.report_to == ["wandb"]:
            import wandb

            wandb.log({"mine": float(state.global_step)}, step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))


def run(folder: Path, to: str, *, watched: bool) -> tuple[HFTrainingDiagnostics, Mine, Trace]:
    rules = [Threshold("loss/value", above=-1.0, name="always")]
    diagnostics = HFTrainingDiagnostics(rules=rules, every_n_steps=5, max_overhead=None, terminal=False)
    mine = Mine()
    callbacks = [diagnostics, mine] if watched else [mine]
    return diagnostics, mine, train(llama(), callbacks, folder, report_to=to, **OPTIONS)


def tensorboard_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (directory,) = {f.parent for f in folder.rglob("events*") if f.parent.name != "traindiag"}
    (_,) = directory.glob("events*")  # theirs alone
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    timed = ("runtime", "per_second")
    tags = [t for t in events.Tags()["scalars"] if not t.endswith(timed)]
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}


def test_tensorboard_keeps_its_points_and_its_one_file(tmp_path: Path) -> None:
    run(tmp_path / "without", "tensorboard", watched=False)
    diagnostics, mine, _ = run(tmp_path / "with", "tensorboard", watched=True)
    without, with_it = (tensorboard_points(tmp_path / name) for name in ("without", "with"))
    assert {tag: points for tag, points in with_it.items() if "diag_" not in tag} == without
    ours = with_it["train/diag_attention/max_logit"]
    assert [step for step, _ in ours] == [5, 10, 15, 20]
    samples = diagnostics.history["attention/max_logit"].values.max(axis=1)
    assert {value for _, value in ours} <= set(samples.tolist())
    norms = diagnostics.history["gradient/norm"].values[:, 0]
    assert max(value for _, value in with_it["train/diag_gradient/norm_max"]) == norms.max()
    assert not any("diag_" in name for row in mine.rows for name in row)  # whoever comes after us sees their row only

    (log,) = (f.parent for f in (tmp_path / "with").rglob("events*") if f.parent.name == "traindiag")
    record = read_log(log)
    assert not record.problems and record.run.length == 20
    assert set(record.history) == set(diagnostics.history)
    assert [a["id"] for a in record.alerts] == [a.id for a in diagnostics.alerts]
    lines = (log / "alerts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [a.id for a in diagnostics.alerts]


def test_wandb_loses_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    found = []
    for watched in (False, True):
        folder = tmp_path / str(watched)
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        run(folder, "wandb", watched=watched)
        wandb.finish()
        wandb.teardown()  # only when its service has ended is the file complete
        timed = ("runtime", "per_second")
        found.append([p for p in wandb_points(folder) if not p[0].endswith(timed)])
    without, with_it = found
    assert sum(name == "mine" for name, _ in without) >= 15
    assert [p for p in with_it if not p[0].startswith("train/diag_")] == without
    assert any(name == "train/diag_attention/max_logit" for name, _ in with_it)


def test_what_the_trainer_keeps_and_prints_is_as_before(tmp_path: Path) -> None:
    _, _, without = run(tmp_path / "without", "none", watched=False)
    _, _, with_it = run(tmp_path / "with", "none", watched=True)
    assert with_it.logs == without.logs  # its history, and so its trainer_state.json
    (ours,) = (tmp_path / "with").rglob("events*")
    assert ours.parent.name == "traindiag" and (ours.parent / "alerts.jsonl").exists()
    assert "gradient/norm" in read_log(tmp_path / "with").history


def test_several_jobs_of_a_run_are_one_log(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    train(llama(), [HFTrainingDiagnostics(terminal=False)], tmp_path, steps=8, **options)
    train(llama(), [HFTrainingDiagnostics(terminal=False)], tmp_path, steps=12, resume=True, **options)
    log = read_log(tmp_path)
    assert log.segments == (0, 1)
    assert log.history["loss/value"].steps.tolist() == list(range(12))


def test_of_what_waits_for_a_row_the_worst_is_not_lost() -> None:
    passengers, nan = Passengers(), float("nan")
    for value in (1.0, 5.0, 2.0):
        passengers.wait(
            {"a/b": value, "a/b_max": value, "a/c_min": value, "a/d_max": nan if value == 5 else value}, 0
        )
    row = {"loss": 3.0}
    passengers.on_log(None, None, None, logs=row)
    assert str(row) == "{'loss': 3.0, 'a/b': 2.0, 'a/b_max': 5.0, 'a/c_min': 1.0, 'a/d_max': nan}"
    passengers.get_out(row)
    passengers.on_log(None, None, None, logs=row)
    assert row == {"loss": 3.0}  # each rides once
