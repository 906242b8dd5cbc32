"""Reads the log of a run back: every segment, as far as it is undamaged."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from traindiag.record.catalogue import near
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.event_file import TAIL, event_files, read_events
from traindiag.record.log_format import (
    ALERTS,
    COVERAGE,
    PREFIX,
    RUN,
    VERSION,
    cells_from_json,
    load_description,
    signal_from_json,
    unmark,
)
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History
from traindiag.record.signal import Signal


@dataclass(frozen=True)
class LogData:
    """What the log of one run holds.

    Args:
        run: What was trained, as the latest segment tells it.
        history: Every signal; steps that a resumed job went through again are there once.
        alerts: ``Alert.to_dict`` of every message, oldest first.
        coverage: What was seen and what was not.
        segments: Numbers of the segments found.
        files: Event files that were read.
        problems: What could not be read, in words.
    """

    run: RunInfo
    history: History
    alerts: tuple[dict[str, Any], ...]
    coverage: tuple[Coverage, ...]
    segments: tuple[int, ...]
    files: tuple[Path, ...]
    problems: tuple[str, ...]


def read_log(path: str | os.PathLike[str], run: str | None = None) -> LogData:
    """Reads one run from a log directory or event file.

    Args:
        path: An event file, or a directory searched with everything below it, such as ``lightning_logs``.
        run: Id of the run; needed only where several lie there.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If there is no such run, or several and ``run`` is None.
    """
    found = {log.run.run_id: log for log in read_logs(path)}
    if run is None and len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise ValueError(f"none of the {len(event_files(path))} event files under {path} holds training diagnostics")
    if run is None:
        raise ValueError(f"{path} holds {len(found)} runs; choose one with run=: {', '.join(found)}")
    if run not in found:
        raise ValueError(f"{path} holds no run {run!r}, only {', '.join(found)}.{near(run, found)}")
    return found[run]


def read_logs(path: str | os.PathLike[str]) -> list[LogData]:
    """Reads every run at or under ``path``, in the order they began.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
    """
    runs: dict[str, list[_Segment]] = defaultdict(list)
    for file in event_files(path):
        reader = _FileReader(file, verify=False)
        if reader.suspicious:
            reader = _FileReader(file, verify=True)
        for segment in reader.found.values():
            runs[segment.run].append(segment)
    return sorted((_join(s) for s in runs.values()), key=lambda log: log.files[0].name)


@dataclass
class _Row:
    """One tensor: samples of one signal."""

    step: int
    signal: Signal
    cells: Cells
    table: NDArray[np.float32]

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.step - self.table[:, 0].astype(np.int64)


@dataclass
class _Segment:
    """What one file holds of one job of a run."""

    run: str
    number: int
    file: Path
    time: float
    start: int | None = None
    info: RunInfo | None = None
    rows: list[_Row] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    coverage: tuple[Coverage, ...] = ()
    problems: list[str] = field(default_factory=list)


class _FileReader:
    """Takes one file apart.

    Checksums are left out at first: they cost far more than all the rest, and few files are damaged. One that shows
    any sign of damage is ``suspicious`` and to be read again with them.
    """

    def __init__(self, file: Path, *, verify: bool) -> None:
        self.file = file
        self.found: dict[tuple[str, int], _Segment] = {}
        self.current: _Segment | None = None
        self.described: dict[str, tuple[_Segment, Signal, Cells]] = {}
        self.contents: dict[str, bytes] = {}
        self.latest: dict[str, int] = {}
        self.problems: dict[str, None] = {}
        self.contradictions = False
        for event in read_events(file, self._problem, verify):
            for value in event.summary.value:
                if value.tag.startswith(PREFIX):
                    try:
                        self._take(event, value)
                    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                        self._problem(f"{self.file}: {value.tag} at step {event.step} skipped: {error}")
        for segment in self.found.values():
            segment.problems = list(self.problems)

    @property
    def suspicious(self) -> bool:
        # One writer, one job, one file; a tail that is still being written is no damage.
        return self.contradictions or len(self.found) > 1 or any(TAIL not in p for p in self.problems)

    def _problem(self, text: str) -> None:
        self.problems[text] = None

    def _segment(self, run: str, number: int, time: float) -> _Segment:
        return self.found.setdefault((run, number), _Segment(run, number, self.file, time))

    def _take(self, event: Event, value: Summary.Value) -> None:
        if value.tag == RUN:
            data = json.loads(value.tensor.string_val[0])
            self.current = self._segment(data["id"], data["segment"], event.wall_time)
            self.current.start = data["step"]
            self.current.info = RunInfo.from_dict(data["run"])
        elif value.tag in (ALERTS, COVERAGE):
            if self.current is None:
                raise ValueError("the record of its run is missing")
            rows = [json.loads(s) for s in value.tensor.string_val]
            if value.tag == ALERTS:
                self.current.alerts += rows
            else:
                self.current.coverage = tuple(Coverage.from_dict(r) for r in rows)
        else:
            self._take_cells(event, value)

    def _take_cells(self, event: Event, value: Summary.Value) -> None:
        content = value.metadata.plugin_data.content
        # Most events repeat the description of the one before, which then costs one comparison.
        if content and content != self.contents.get(value.tag):
            data = load_description(content)
            if data["v"] > VERSION:
                raise ValueError(f"format {data['v']} is newer than the {VERSION} that this package reads")
            self.contradictions |= value.tag in self.contents
            self.current = self._segment(data["id"], data["segment"], event.wall_time)
            self.described[value.tag] = self.current, signal_from_json(data["signal"]), cells_from_json(data["cells"])
            self.contents[value.tag] = content
        if value.tag not in self.described:
            raise ValueError("its description is missing")
        segment, signal, cells = self.described[value.tag]
        shape = tuple(d.size for d in value.tensor.tensor_shape.dim)
        if len(shape) != 2 or shape[1] != 1 + len(cells):
            raise ValueError(f"expected a tensor [k, {1 + len(cells)}], got {list(shape)}")
        table = np.frombuffer(value.tensor.tensor_content, "<f4").reshape(shape)
        if not ((table[:, 0] >= 0) & (table[:, 0] <= event.step)).all():
            raise ValueError("its steps are damaged")
        row = _Row(event.step, signal, cells, table)
        self.contradictions |= bool(row.steps[0] <= self.latest.get(signal.name, -1))
        self.latest[signal.name] = event.step
        segment.rows.append(row)


def _join(segments: list[_Segment]) -> LogData:
    """Lays the segments of one run over each other: where a later one begins, the earlier ones end."""
    segments.sort(key=lambda s: (s.number, s.time))
    history = History()
    alerts: list[dict[str, Any]] = []
    for segment in segments:
        if segment.start is not None:
            history.rollback(segment.start - 1)
            alerts = [a for a in alerts if a["step"] < segment.start]
        for row in segment.rows:
            values = row.table[:, 1:]
            history.extend(row.signal, row.steps, row.cells, values, unmark(values), segment.number)
        alerts += segment.alerts
    infos = [s.info for s in segments if s.info is not None]
    return LogData(
        run=infos[-1] if infos else RunInfo(run_id=segments[0].run),
        history=history,
        alerts=tuple(alerts),
        coverage=next((s.coverage for s in reversed(segments) if s.coverage), ()),
        segments=tuple(dict.fromkeys(s.number for s in segments)),
        files=tuple(dict.fromkeys(s.file for s in segments)),
        problems=tuple(dict.fromkeys(p for s in segments for p in s.problems)),
    )
