"""Reads the log of a run back: every segment, as far as it is undamaged."""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    FRAMES,
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
from traindiag.record.signal import Lane, Signal

MAX_SAMPLES = 200_000
MAX_BYTES = 256 * 2**20
"""What is read of one run; beyond that, samples are left out where they stand closest, as in a live history."""


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
        repeated: What each job measured beyond the step from which a later one went on: it is not in ``history``.
    """

    run: RunInfo
    history: History
    alerts: tuple[dict[str, Any], ...]
    coverage: tuple[Coverage, ...]
    segments: tuple[int, ...]
    files: tuple[Path, ...]
    problems: tuple[str, ...]
    repeated: tuple[History, ...] = ()


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
    return [join(s) for s in sorted(read_segments(path).values(), key=lambda segments: segments[0].time)]


def read_segments(path: str | os.PathLike[str]) -> dict[str, list[Segment]]:
    """Every run at or under ``path`` by its id, as the jobs that it consists of, oldest first.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
    """
    return by_run(job for file in event_files(path) for job in read_file(file).jobs)


class Contents(NamedTuple):
    """What one event file holds of ours: jobs, and in words what could not be read, even where no job was found."""

    jobs: tuple[Segment, ...]
    problems: tuple[str, ...]


def read_file(file: Path) -> Contents:
    """Reads one event file, as far as it is undamaged."""
    reader = _Reader(file)
    reader.take_all(read_events(file, reader.problem, verify=False))
    if reader.suspicious:
        reader = _Reader(file)
        reader.take_all(read_events(file, reader.problem, verify=True))
    return reader.contents()


def read_stream(name: Path, events: Iterable[Event]) -> Contents:
    """Reads events that somebody else has read from a file.

    Args:
        name: What :attr:`LogData.files` and problems call it.
        events: In the order in which they were written.
    """
    reader = _Reader(name)
    reader.take_all(events)
    return reader.contents()


def by_run(segments: Iterable[Segment]) -> dict[str, list[Segment]]:
    """Sorts jobs by the run they belong to, oldest first."""
    runs: dict[str, list[Segment]] = defaultdict(list)
    for segment in segments:
        runs[segment.run].append(segment)
    for jobs in runs.values():
        jobs.sort(key=lambda s: (s.number, s.time))
    return runs


@dataclass
class Row:
    """One tensor: ``k`` samples of one signal with ``n`` cells."""

    step: int
    signal: Signal
    cells: Cells
    table: NDArray[np.float32]
    every: int = 1

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.step - self.table[:, 0].astype(np.int64)

    @property
    def values(self) -> NDArray[np.float32]:
        """``[k, n]``."""
        return self.table[:, 1 : 1 + len(self.cells)]

    @property
    def ranks(self) -> NDArray[np.int64] | None:
        """``[k, n]`` where they were written."""
        n = len(self.cells)
        return self.table[:, 1 + n :].astype(np.int64) if n and self.table.shape[1] > 1 + n else None


@dataclass
class FrameFacts:
    """What a frame holds beside its readings, whose names stand in their order."""

    step: int
    lane: Lane
    names: tuple[str, ...]
    time: float
    seconds_per_step: float | None
    updates: dict[str, int]
    learning_rates: dict[str, float]
    early: bool = False
    batches: tuple[str, ...] = ()


@dataclass
class Segment:
    """What one file holds of one job of a run."""

    run: str
    number: int
    file: Path
    time: float
    start: int | None = None
    infos: list[tuple[int, Lane, RunInfo]] = field(default_factory=list)
    frames: list[FrameFacts] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    coverage: tuple[Coverage, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def info(self) -> RunInfo | None:
        """The latest facts about the run."""
        return self.infos[-1][-1] if self.infos else None


DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, zlib.error)
"""What data that is not ours, or no longer whole, makes of reading it."""


class _Reader:
    """Takes the events of one file apart.

    Checksums are left out at first: they cost far more than all the rest, and few files are damaged. One that shows
    any sign of damage is ``suspicious`` and to be read again with them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[tuple[str, int], Segment] = {}
        self.current: Segment | None = None
        self.described: dict[str, tuple[Segment, Signal, Cells, int, int]] = {}
        self.descriptions: dict[str, bytes] = {}
        self.latest: dict[str, int] = {}
        self.problems: dict[str, None] = {}
        self.contradictions = False

    def take_all(self, events: Iterable[Event]) -> None:
        for event in events:
            for value in event.summary.value:
                if value.tag.startswith(PREFIX):
                    try:
                        self._take(event, value)
                    except DAMAGE as error:
                        self.problem(f"{self.file}: {value.tag} at step {event.step} skipped: {error}")
        for segment in self.found.values():
            segment.problems = list(self.problems)

    def contents(self) -> Contents:
        return Contents(tuple(self.found.values()), tuple(self.problems))

    @property
    def suspicious(self) -> bool:
        # One writer, one job, one file; a tail that is still being written is no damage.
        return self.contradictions or len(self.found) > 1 or any(TAIL not in p for p in self.problems)

    def problem(self, text: str) -> None:
        self.problems[text] = None

    def _segment(self, run: str, number: int, time: float) -> Segment:
        return self.found.setdefault((run, number), Segment(run, number, self.file, time))

    def _take(self, event: Event, value: Summary.Value) -> None:
        if value.tag == RUN:
            data = json.loads(value.tensor.string_val[0])
            self.current = self._segment(data["id"], data["segment"], event.wall_time)
            self.current.start = data["step"]
            step, lane = data.get("from", (data["step"], "slow"))
            self.current.infos.append((step, lane, RunInfo.from_dict(data["run"])))
        elif value.tag in (ALERTS, COVERAGE, FRAMES):
            if self.current is None:
                raise ValueError("the record of its run is missing")
            rows = [json.loads(s) for s in value.tensor.string_val]
            if value.tag == ALERTS:
                self.current.alerts += rows
            elif value.tag == FRAMES:
                for chunk in rows:
                    self.current.frames += _frame_facts(chunk)
            else:
                self.current.coverage = tuple(Coverage.from_dict(r) for r in rows)
        else:
            self._take_cells(event, value)

    def _take_cells(self, event: Event, value: Summary.Value) -> None:
        content = value.metadata.plugin_data.content
        # Most events repeat the description of the one before, which then costs one comparison.
        if content and content != self.descriptions.get(value.tag):
            data = load_description(content)
            if data["v"] > VERSION:
                raise ValueError(f"format {data['v']} is newer than the {VERSION} that this package reads")
            self.contradictions |= value.tag in self.descriptions
            self.current = self._segment(data["id"], data["segment"], event.wall_time)
            signal, cells = signal_from_json(data["signal"]), cells_from_json(data["cells"])
            width = 1 + len(cells) * (2 if data.get("ranks") else 1)
            self.described[value.tag] = self.current, signal, cells, width, int(data.get("every", 1))
            self.descriptions[value.tag] = content
        if value.tag not in self.described:
            raise ValueError("its description is missing")
        segment, signal, cells, width, every = self.described[value.tag]
        shape = tuple(d.size for d in value.tensor.tensor_shape.dim)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"expected a tensor [k, {width}], got {list(shape)}")
        table = np.frombuffer(value.tensor.tensor_content, "<f4").reshape(shape)
        if not ((table[:, 0] >= 0) & (table[:, 0] <= event.step)).all():
            raise ValueError("its steps are damaged")
        row = Row(event.step, signal, cells, table, every)
        self.contradictions |= bool(row.steps[0] <= self.latest.get(signal.name, -1))
        self.latest[signal.name] = event.step
        segment.rows.append(row)


def _frame_facts(chunk: dict[str, Any]) -> list[FrameFacts]:
    """What stands in one chunk; infinite numbers are strings there."""
    names = [tuple(n) for n in chunk["names"]]
    return [
        FrameFacts(
            step,
            lane,
            names[at],
            float(time),
            None if pace is None else float(pace),
            {name: int(count) for name, count in updates.items()},
            {name: float(rate) for name, rate in rates.items()},
            bool(rest and rest[0]),
            tuple(rest[1]) if len(rest) > 1 else (),
        )
        for step, lane, at, time, pace, updates, rates, *rest in chunk["rows"]
    ]


def join(segments: Sequence[Segment]) -> LogData:
    """Lays the segments of one run over each other: where a later one begins, the earlier ones end."""
    history = History(MAX_SAMPLES, MAX_BYTES)
    alerts: list[dict[str, Any]] = []
    repeated: list[History] = []
    for segment in segments:
        if segment.start is not None:
            repeated.append(_from_step(history, segment.start))
            history.rollback(segment.start - 1)
            alerts = [a for a in alerts if a["step"] < segment.start]
        for row in segment.rows:
            history.extend(row.signal, row.steps, row.cells, row.values, unmark(row.values), segment.number)
        alerts += segment.alerts
    infos = [s.info for s in segments if s.info is not None]
    problems = [p for s in segments for p in s.problems]
    problems += [
        f"{name} has more samples than are kept in memory: of the distant past some are left out"
        for name, series in history.items()
        if series.thinned
    ]
    return LogData(
        run=infos[-1] if infos else RunInfo(run_id=segments[0].run),
        history=history,
        alerts=tuple(alerts),
        coverage=next((s.coverage for s in reversed(segments) if s.coverage), ()),
        segments=tuple(dict.fromkeys(s.number for s in segments)),
        files=tuple(dict.fromkeys(s.file for s in segments)),
        problems=tuple(dict.fromkeys(problems)),
        repeated=tuple(part for part in repeated if part),
    )


def _from_step(history: History, step: int) -> History:
    """The samples from ``step`` on."""
    later = History(history.max_samples, history.max_bytes)
    for series in history.values():
        at = int(np.searchsorted(series.steps, step))
        if at < len(series):
            rows = series.steps[at:], series.cells, series.values[at:], series.seen[at:]
            later.extend(series.signal, *rows, int(series.segments[at]))
    return later
