"""Whatever logs beside us keeps every point that the user logged."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from traindiag import Threshold, TrainingDiagnostics
from traindiag.record.log import read_log

STEPS = 30


class Talkative(Automatic):
    """Logs a number of its own at every step, straight to the logger's experiment."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.talk(float(self.global_step))
        return super().training_step(batch, batch_idx)

    def talk(self, value: float) -> None:
        experiment = self.logger.experiment
        if isinstance(self.logger, WandbLogger):
            experiment.log({"mine": value}, step=self.global_step)
        elif isinstance(self.logger, TensorBoardLogger):
            experiment.add_scalar("mine", value, self.global_step)
        else:
            self.logger.log_metrics({"mine": value}, self.global_step)


def train(logger: Logger, folder: Path, *, with_diagnostics: bool) -> TrainingDiagnostics:
    rules = [Threshold("loss/value", above=-1.0, name="always")]
    diagnostics = TrainingDiagnostics(rules=rules, every_n_steps=5, max_overhead=None, terminal=False)
    torch.manual_seed(0)
    fit(
        [diagnostics] if with_diagnostics else [],
        steps=STEPS,
        module=Talkative(DropoutGPT(), Trace()),
        logger=logger,
        folder=folder,
        log_every_n_steps=5,
    )
    return diagnostics


def csv_points(folder: Path) -> list[tuple[str, str, str]]:
    (file,) = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return sorted(
        (k, r["step"], v) for r in rows for k, v in r.items() if v and k != "step" and not k.startswith("diag")
    )


def tensorboard_points(folder: Path) -> list[tuple[str, int, float]]:
    (directory,) = {f.parent for f in folder.rglob("events*")}
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith("diag_")]
    return sorted((t, e.step, e.value) for t in tags for e in events.Scalars(t))


def wandb_points(folder: Path) -> list[tuple[str, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    points = []
    for data in _leveldb_records(file.read_bytes()):
        record = Record.FromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith(("diag_", "_", "trainer/")):
                points.append((name, json.loads(item.value_json)))
    return sorted(points)


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of wandb's file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


LOGGERS: dict[str, Any] = {
    "csv": (lambda folder: CSVLogger(folder), csv_points),
    "tensorboard": (lambda folder: TensorBoardLogger(folder), tensorboard_points),
    "wandb": (lambda folder: WandbLogger(save_dir=folder, offline=True), wandb_points),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_no_point_of_the_user_is_lost(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    make, points = LOGGERS[kind]
    found = []
    for with_diagnostics in (False, True):
        folder = tmp_path / str(with_diagnostics)
        folder.mkdir()
        logger = make(folder)
        train(logger, folder, with_diagnostics=with_diagnostics)
        if kind == "wandb":
            import wandb

            logger.experiment.finish()
            wandb.teardown()  # only when its service has ended is the file complete
        found.append(points(folder))
    without, with_it = found
    assert sum(p[0] == "mine" for p in without) >= STEPS - 1  # wandb drops the last one by itself
    assert with_it == without
    assert any("diag_gradient" in p.read_text("latin-1") for p in tmp_path.rglob("*") if p.is_file())  # we did log


def test_one_event_file_and_it_holds_the_record(tmp_path: Path) -> None:
    diagnostics = train(TensorBoardLogger(tmp_path), tmp_path, with_diagnostics=True)
    assert len(list(tmp_path.rglob("events*"))) == 1
    log = read_log(tmp_path)
    assert not log.problems and log.run.length == STEPS
    for name, series in diagnostics.history.items():
        stored = log.history[name]
        assert stored.steps.tolist() == series.steps.tolist(), name
        assert (stored.values[series.seen] == series.values[series.seen]).all(), name
    assert [a["id"] for a in log.alerts] == [a.id for a in diagnostics.alerts]
    lines = (next(tmp_path.rglob("alerts.jsonl"))).read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [a.id for a in diagnostics.alerts]


def test_what_lightning_logs_can_have_limits(tmp_path: Path) -> None:
    rule = Threshold("logged/train/loss", above=0.0, name="mine")
    diagnostics = TrainingDiagnostics(rules=[rule], every_n_steps=2, terminal=False)
    trace = fit([diagnostics], steps=6)
    series = diagnostics.history["logged/train/loss"]
    assert {0, 2, 4} <= set(series.steps.tolist())
    assert series.values[:, 0].tolist() == [float(trace.losses[i]) for i in series.steps]
    assert any(a.rule == "mine" for a in diagnostics.alerts)


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([diagnostics], fast_dev_run=3, folder=tmp_path, logger=None, max_steps=-1)
    assert diagnostics.history["loss/value"].steps.tolist() == [0, 1, 2]
    assert not list(tmp_path.rglob("*"))


class Counting(Automatic):
    """Hands a number of its own to the diagnostics at every step."""

    diagnostics: TrainingDiagnostics

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.diagnostics.log("reward/kl", float(self.global_step))
        return super().training_step(batch, batch_idx)


def test_a_number_of_ones_own_is_judged_by_its_name_at_every_step(tmp_path: Path) -> None:
    """Lightning puts the module's ``log`` in the place of every callback's."""
    rules = [Threshold("reward/kl", above=11.5, name="far")]
    diagnostics = TrainingDiagnostics(rules=rules, max_overhead=None, terminal=False)
    module = Counting(DropoutGPT(), Trace())
    module.diagnostics = diagnostics
    fit([diagnostics], steps=15, module=module, folder=tmp_path)
    assert diagnostics.history["reward/kl"].values[:, 0].tolist() == list(range(15))
    assert [(a.rule, a.step) for a in diagnostics.alerts if a.rule == "far"] == [("far", 12)]
