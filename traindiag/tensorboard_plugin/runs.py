"""The runs that TensorBoard shows, read from their event files or, where those are out of reach, through TensorBoard.

TensorBoard keeps a sample of what it reads, drops what a resumed job went through again, and describes a tag by the
first of its events. The files themselves hold all of it and are read faster, so they come first.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

from traindiag.panels.figures.view import natural
from traindiag.record.log import DAMAGE, Contents, LogData, Segment, by_run, join, read_file, read_stream
from traindiag.record.log_format import PLUGIN, RUN

PATIENCE = 5.0
"""A file that grows is read again after this many times as long as reading it took: a large and damaged one, whose
checksums are verified in Python, must not keep the machine busy that trains."""
_ALL = 10**9


@dataclass(frozen=True)
class Run:
    """One run as it is offered.

    Args:
        name: What it is called: the names that TensorBoard has for the folders of its jobs.
        folders: Those names one by one; a run that was resumed in a new folder has several.
        log: What it holds.
        stamp: Changes whenever the log does.
        sampled: Whether TensorBoard kept a sample only.
    """

    name: str
    folders: tuple[str, ...]
    log: LogData
    stamp: str
    sampled: bool = False


@dataclass(frozen=True)
class Found:
    """Every run by its name, and what could not be read of folders that show none."""

    runs: Mapping[str, Run]
    problems: tuple[str, ...]

    def run(self, name: str) -> Run | None:
        """The run of that name, or the one that has a folder of that name."""
        return self.runs.get(name) or next((r for r in self.runs.values() if name in r.folders), None)


@dataclass(frozen=True)
class _Part:
    """What one folder holds."""

    stamp: tuple[Any, ...]
    contents: tuple[Contents, ...]
    cost: float
    read_at: float


class Runs:
    """Reads what has changed since the last call, and nothing else.

    Args:
        provider: TensorBoard's data provider.
        logdir: The folder that it was started with; None or one that is not on this machine is read through it.
        clock: Seconds, for :data:`PATIENCE`.
    """

    def __init__(self, provider: Any, logdir: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        root = Path(os.path.expanduser(logdir)) if logdir else None
        self._root = root if root is not None and root.is_dir() else None
        self._clock = clock
        self._parts: dict[str, _Part] = {}
        self._joined: dict[str, Run] = {}
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the event files themselves are read."""
        return self._root is not None

    def find(self, context: Any, experiment: str) -> Found:
        """Every run with training diagnostics, as it is now.

        Args:
            context: TensorBoard's request context.
            experiment: Id of the experiment.
        """
        with self._lock:
            listed = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN)
            parts = {}
            for folder in sorted(listed):
                if self._root is not None:
                    parts[folder] = self._files(folder, self._root)
                else:
                    parts[folder] = self._stream(folder, listed[folder], context, experiment)
            self._parts = parts
            return self._join()

    def _files(self, folder: str, root: Path) -> _Part:
        stamp = tuple(_stamps(root / folder))
        before = self._parts.get(folder)
        if before is not None and (stamp == before.stamp or self._clock() < before.read_at + PATIENCE * before.cost):
            return before
        began = self._clock()
        contents = tuple(_read(Path(path)) for path, _, _ in stamp)
        now = self._clock()
        return _Part(stamp, contents, now - began, now)

    def _stream(self, folder: str, tags: Mapping[str, Any], context: Any, experiment: str) -> _Part:
        stamp = tuple(sorted((tag, s.max_step, s.max_wall_time) for tag, s in tags.items()))
        before = self._parts.get(folder)
        if before is not None and stamp == before.stamp:
            return before
        from tensorboard.data.provider import RunTagFilter

        read = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=_ALL,
            run_tag_filter=RunTagFilter(runs=[folder]),
        ).get(folder, {})
        described = {tag: s.plugin_content for tag, s in tags.items()}
        events = [_event(tag, datum, described.get(tag, b"")) for tag, data in read.items() for datum in data]
        # What a job says of itself comes before what it measured.
        events.sort(key=lambda e: (e.wall_time, e.summary.value[0].tag != RUN, e.step))
        return _Part(stamp, (read_stream(Path(folder), events),), 0.0, 0.0)

    def _join(self) -> Found:
        home: dict[int, tuple[str, tuple[Any, ...]]] = {}  # of each job its folder, and what changes with its files
        jobs: list[Segment] = []
        problems: list[str] = []
        for folder, part in self._parts.items():
            for contents in part.contents:
                jobs += contents.jobs
                home |= {id(job): (folder, part.stamp) for job in contents.jobs}
                problems += contents.problems if not contents.jobs else ()
        together = by_run(jobs)
        tenants = Counter(folder for segments in together.values() for folder in {home[id(s)][0] for s in segments})
        runs: dict[str, Run] = {}
        for run_id, segments in together.items():
            folders = tuple(dict.fromkeys(home[id(s)][0] for s in segments))
            name = " + ".join(folders)
            if any(tenants[folder] > 1 for folder in folders):  # several runs were written into one folder
                name += f" ({run_id})"
            stamp = _digest([home[id(s)] for s in segments])
            known = self._joined.get(name)
            if known is not None and known.stamp == stamp:
                runs[name] = known
                continue
            try:
                runs[name] = Run(name, folders, join(segments), stamp, not self.local)
            except DAMAGE as error:
                problems.append(f"{name}: its parts do not fit together: {type(error).__name__}: {error}")
        self._joined = dict(sorted(runs.items(), key=lambda item: natural(item[0])))
        return Found(self._joined, tuple(dict.fromkeys(problems)))


def _stamps(folder: Path) -> Iterable[tuple[str, int, int]]:
    try:
        with os.scandir(folder) as entries:
            files = sorted(e.path for e in entries if "tfevents" in e.name and e.is_file())
    except OSError:  # gone since TensorBoard saw it
        return
    for path in files:
        try:
            known = os.stat(path)
        except OSError:
            continue
        yield path, known.st_size, known.st_mtime_ns


def _read(file: Path) -> Contents:
    try:
        return read_file(file)
    except OSError as error:
        return Contents((), (f"{file}: {error.strerror or error}",))


def _event(tag: str, datum: Any, content: bytes) -> Event:
    array = np.asarray(datum.numpy)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in array.shape])
    if array.dtype.kind in "SUO":
        strings = [s if isinstance(s, bytes) else str(s).encode() for s in array.ravel().tolist()]
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=strings)
    else:
        tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=array.astype("<f4").tobytes())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
    return Event(step=datum.step, wall_time=datum.wall_time, summary=Summary(value=[value]))


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
