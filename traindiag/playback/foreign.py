"""Other people's logs (TensorBoard scalars, CSV, JSON lines, the Hugging Face Trainer's state), as far as they go."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from traindiag.playback.names import STEP_NAMES, step_columns
from traindiag.record.event_file import event_files, read_events
from traindiag.record.log_format import PREFIX
from traindiag.record.run_info import RunInfo

TRAINER_STATE = "trainer_state.json"
_OURS = ("alerts.jsonl",)
_KINDS = (TRAINER_STATE, "tfevents", ".csv", ".jsonl")


class Unreadable(ValueError):
    """There is no log, or none that can be read."""


@dataclass
class ForeignRun:
    """One run of somebody else's log.

    Args:
        source: Where it was read.
        run: What the log tells of the run.
        columns: Values by step, by the log's names.
        shift: What was taken off the log's steps, because it counts the updates done where we count those before.
        notes: What could not be read or has to be known, in words.
    """

    source: Path
    run: RunInfo = field(default_factory=RunInfo)
    columns: dict[str, dict[int, float]] = field(default_factory=dict)
    shift: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, step: int, value: float) -> None:
        """Takes one value; a step that was there before replaces it and all later ones, as a resumed run does."""
        column = self.columns.setdefault(name, {})
        if column and step <= next(reversed(column)):
            for later in [s for s in column if s >= step]:
                del column[later]
        column[step] = value

    def count_from_zero(self) -> None:
        """Takes one off every step: the row with step 1 is about the first step, which is our step 0."""
        self.shift = 1
        self.columns = {n: {max(0, s - 1): v for s, v in column.items()} for n, column in self.columns.items()}


def read_foreign(path: Path) -> list[ForeignRun]:
    """Every run at or under ``path``, of the first kind of log that there is.

    Raises:
        Unreadable: If there is nothing that can be read.
    """
    if path.is_file():
        return [_read_file(path)]
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name not in _OURS]
    for kind in _KINDS:
        found = [f for f in files if (kind in f.name if kind == "tfevents" else f.name.endswith(kind))]
        runs: list[ForeignRun] = []
        if kind == TRAINER_STATE:
            found = _latest_states(found)
        folders: dict[Path, list[Path]] = {}
        for file in found:
            folders.setdefault(file.parent if kind == "tfevents" else file, []).append(file)
        problems = []
        for source, together in folders.items():
            try:
                runs.append(_read_events(source, together) if kind == "tfevents" else _read_file(source))
            except Unreadable as error:  # a CSV of something else may lie there too
                problems.append(str(error))
        if runs:
            runs[0].notes += problems if kind != "tfevents" else []
            return runs
        if problems and kind != "tfevents":
            raise Unreadable(problems[0])
    raise Unreadable(
        f"{path} holds no log that can be read: no event file with numbers, {TRAINER_STATE}, .csv or .jsonl"
    )


def _read_file(file: Path) -> ForeignRun:
    if "tfevents" in file.name:
        return _read_events(file, [file])
    readers: Mapping[str, Callable[[Path], ForeignRun]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_state,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise Unreadable(f"{file}: expected an event file (tfevents) or {', '.join(readers)}")
    try:
        run = reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Unreadable(f"{file} cannot be read: {error}") from error
    if not run.columns:
        raise Unreadable(f"{file} holds no numbers")
    return run


def _latest_states(files: list[Path]) -> list[Path]:
    """Each checkpoint repeats the log from its beginning: of those of one run the longest is enough."""
    longest: dict[Path, tuple[int, Path]] = {}
    for file in files:
        folder = file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent
        size = file.stat().st_size
        if folder not in longest or size > longest[folder][0]:
            longest[folder] = size, file
    return [file for _, file in longest.values()]


def _read_events(source: Path, files: list[Path]) -> ForeignRun:
    run = ForeignRun(source)
    for file in files:
        for event in read_events(file, run.notes.append, verify=False):
            for value in event.summary.value:
                number = None if value.tag.startswith(PREFIX) else _number_of(value)
                if number is not None:
                    run.add(value.tag, max(0, event.step), number)
    if not run.columns:
        raise Unreadable(f"{source} holds no numbers" + "".join(f"; {n}" for n in run.notes[:1]))
    if "train/epoch" in run.columns and "train/loss" in run.columns:
        run.count_from_zero()
        run.notes.append(_TRAINER_NOTE)
    return run


def _number_of(value: Summary.Value) -> float | None:
    if value.WhichOneof("value") == "simple_value":
        return float(value.simple_value)
    if value.WhichOneof("value") != "tensor" or value.metadata.plugin_data.plugin_name not in ("", "scalars"):
        return None
    tensor = value.tensor
    for kind, held in ((1, tensor.float_val), (2, tensor.double_val)):
        if tensor.dtype == kind and not tensor.tensor_shape.dim:
            if held:
                return float(held[0])
            size = 4 * kind
            if len(tensor.tensor_content) == size:
                return float(np.frombuffer(tensor.tensor_content, f"<f{size}")[0])
    return None


_TRAINER_NOTE = (
    "the Hugging Face Trainer counts from 1: one was taken off its steps. Its loss is a mean since the row before, "
    "in which NaN and infinity are left out unless logging_nan_inf_filter is off"
)


def _read_csv(file: Path) -> ForeignRun:
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader((line.replace("\0", "") for line in _no_comments(lines)), delimiter=delimiter)
        return _from_rows(file, reader, [name for name in reader.fieldnames or () if name])


def _no_comments(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in lines if not line.startswith("#"))


def _read_jsonl(file: Path) -> ForeignRun:
    rows, broken = [], 0
    for line in file.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(_flat(row))
        except (ValueError, AttributeError, RecursionError):
            broken += 1
    run = _from_rows(file, rows, list(dict.fromkeys(name for row in rows for name in row)))
    if broken:
        run.notes.append(
            f"{file}: {broken} line{'s' * (broken > 1)} could not be read as JSON and {_WERE[broken > 1]} skipped"
        )
    return run


_WERE = {False: "was", True: "were"}


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Groups become parts of the name: ``{"train": {"loss": 1}}`` is ``train/loss``."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= _flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _from_rows(file: Path, rows: Iterable[Mapping[str, Any]], names: list[str]) -> ForeignRun:
    columns = step_columns(names)
    if not columns:
        told = f"it has {', '.join(map(repr, names))}" if names else "it has no columns"
        raise Unreadable(f"{file} has no column of steps ({', '.join(STEP_NAMES)}); {told}")
    run, skipped = ForeignRun(file), 0
    for row in rows:
        step = next((s for s in (_number(row.get(name)) for name in columns) if s is not None), None)
        if step is None or not math.isfinite(step) or step < 0:
            skipped += 1
            continue
        for name, text in row.items():
            if name and name not in columns and name.lower() != "epoch" and (value := _number(text)) is not None:
                run.add(name, int(step), value)
    if skipped:
        run.notes.append(f"{file}: {skipped} row{'s' * (skipped > 1)} without a step {_WERE[skipped > 1]} skipped")
    if "train/global_step" in columns:
        run.count_from_zero()
        run.notes.append(_TRAINER_NOTE)
    return run


def _number(value: Any) -> float | None:
    """None for what is no number: an empty field was not measured, the text ``nan`` was."""
    if value is None or isinstance(value, (bool, list)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _read_state(file: Path) -> ForeignRun:
    text = file.read_text(encoding="utf-8", errors="replace")
    run = ForeignRun(file)
    try:
        data = json.loads(text)
    except ValueError:
        data = {"log_history": list(_rows_before_the_damage(text))}
        run.notes.append(f"{file} is incomplete or damaged: read as far as it goes")
    if not isinstance(data, dict) or not isinstance(data.get("log_history"), list):
        raise Unreadable(f"{file}: expected the log_history of a Hugging Face {TRAINER_STATE}")
    for row in data["log_history"]:
        step = _number(row.get("step")) if isinstance(row, dict) else None
        if step is None or "train_runtime" in row:  # the last row sums up
            continue
        for name, value in row.items():
            if name not in ("step", "epoch") and (number := _number(value)) is not None:
                run.add(name, int(step), number)
    run.count_from_zero()
    run.notes.append(_TRAINER_NOTE)
    length, batch = data.get("max_steps"), data.get("train_batch_size")
    run.run = RunInfo(
        length=length if isinstance(length, int) and length > 0 else None,
        batch_size=batch if isinstance(batch, int) else None,
    )
    return run


def _rows_before_the_damage(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = text.find("[", text.find('"log_history"')) + 1 if '"log_history"' in text else 0
    while (at := text.find("{", at)) > 0:
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield row


def has_event_files(path: Path) -> bool:
    """Whether there may be a log of ours; a file of another kind is not opened as one."""
    return any("tfevents" in file.name for file in event_files(path)) if path.is_dir() else "tfevents" in path.name
