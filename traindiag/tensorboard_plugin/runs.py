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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from traindiag.record.log_format import PLUGIN, RUN, load_description

PATIENCE = 5.0
"""A file that grows is read again after this many times as long as reading it took: a large and damaged one, whose
checksums are verified in Python, must not keep the machine busy that trains."""
EAGER_BYTES = 256 * 2**20
"""Of so many bytes of logs, the latest first, it is known at once how their runs are. Others are read when they are
chosen: a folder of a hundred runs opens as fast as one of ten."""
KEPT_BYTES = 1024 * 2**20
"""Of what was chosen so much stays in memory, the latest choice first."""
STREAM_BYTES = 16 * 2**20
"""What a run that is read through TensorBoard is taken to weigh."""
_ALL = 10**9


@dataclass(frozen=True)
class Run:
    """One run as it is offered.

    Args:
        name: What it is called: the names that TensorBoard has for the folders of its jobs.
        folders: Those names one by one; a run that was resumed in a new folder has several.
        log: What it holds, None while nobody has asked for it.
        stamp: Changes whenever the log does.
        last_step: The last step that is known of.
        sampled: Whether TensorBoard kept a sample only.
    """

    name: str
    folders: tuple[str, ...]
    log: LogData | None
    stamp: str
    last_step: int | None
    sampled: bool = False


@dataclass(frozen=True)
class Found:
    """Every run by its name, and what could not be read of folders that show none."""

    runs: Mapping[str, Run]
    problems: tuple[str, ...]

    def run(self, name: str) -> Run | None:
        """The run of that name, or the one that has a folder of that name."""
        return self.runs.get(name) or next((r for r in self.runs.values() if name in r.folders), None)

    def folders(self, name: str) -> tuple[str, ...]:
        """The folders of that run, or what is taken for one that is not known yet."""
        run = self.run(name)
        return (name,) if run is None else run.folders


_Stamp = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class _Folder:
    """What is known of a folder without reading it."""

    stamp: _Stamp
    size: int
    latest: float
    step: int
    run: str | None


@dataclass(frozen=True)
class _Part:
    """What one folder holds."""

    stamp: _Stamp
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
        self._asked: dict[str, None] = {}  # folders, the latest wish last
        self._lock = threading.Lock()

    @property
    def local(self) -> bool:
        """Whether the event files themselves are read."""
        return self._root is not None

    def find(self, context: Any, experiment: str, wanted: Iterable[str] = ()) -> Found:
        """Every run with training diagnostics, as it is now.

        Args:
            context: TensorBoard's request context.
            experiment: Id of the experiment.
            wanted: Names of runs, or of folders, whose logs are needed.
        """
        with self._lock:
            listed = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN)
            folders = {name: self._look(name, listed[name]) for name in sorted(listed)}
            chosen = self._choose(folders, wanted)
            self._parts = {
                name: self._read(name, listed[name], folders[name].stamp, context, experiment) for name in chosen
            }
            return self._join({name: folder for name, folder in folders.items() if name not in chosen})

    def _look(self, name: str, tags: Mapping[str, Any]) -> _Folder:
        """What is known of a folder without reading it."""
        latest = max((s.max_wall_time for s in tags.values()), default=0.0)
        step = max((s.max_step for s in tags.values()), default=0)
        run = next((i for s in tags.values() if (i := _run_id(s.plugin_content)) is not None), None)
        if self._root is None:
            stamp = tuple(sorted((tag, s.max_step, s.max_wall_time) for tag, s in tags.items()))
            return _Folder(stamp, STREAM_BYTES, latest, step, run)
        files = tuple(_stamps(self._root / name))
        return _Folder(files, sum(size for _, size, _ in files), latest, step, run)

    def _choose(self, folders: Mapping[str, _Folder], wanted: Iterable[str]) -> list[str]:
        """Those to be read: what is wanted, what was wanted lately, and the latest."""
        known = Found(self._joined, ())
        asked = [folder for name in wanted for folder in known.folders(name) if folder in folders]
        for name in asked:
            self._asked.pop(name, None)
            self._asked[name] = None
        chosen = set(asked)
        room = KEPT_BYTES - sum(folders[name].size for name in chosen)
        for name in reversed(self._asked):
            if name in folders and name not in chosen and folders[name].size <= room:
                room -= folders[name].size
                chosen.add(name)
        room = EAGER_BYTES
        for name in sorted(folders, key=lambda n: folders[n].latest, reverse=True):
            room -= folders[name].size
            if room < 0:
                break
            chosen.add(name)
        whole = {folders[name].run for name in chosen} - {None}  # of a run that was resumed all jobs or none
        return [name for name, folder in folders.items() if name in chosen or folder.run in whole]

    def _read(self, name: str, tags: Mapping[str, Any], stamp: _Stamp, context: Any, experiment: str) -> _Part:
        before = self._parts.get(name)
        if before is not None and (stamp == before.stamp or self._clock() < before.read_at + PATIENCE * before.cost):
            return before
        began = self._clock()
        if self._root is not None:
            contents = tuple(_read(Path(path)) for path, _, _ in stamp)
        else:
            contents = (self._stream(name, tags, context, experiment),)
        now = self._clock()
        return _Part(stamp, contents, now - began, now)

    def _stream(self, name: str, tags: Mapping[str, Any], context: Any, experiment: str) -> Contents:
        from tensorboard.data.provider import RunTagFilter

        read = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN,
            downsample=_ALL,
            run_tag_filter=RunTagFilter(runs=[name]),
        ).get(name, {})
        described = {tag: s.plugin_content for tag, s in tags.items()}
        events = [_event(tag, datum, described.get(tag, b"")) for tag, data in read.items() for datum in data]
        # What a job says of itself comes before what it measured.
        events.sort(key=lambda e: (e.wall_time, e.summary.value[0].tag != RUN, e.step))
        return read_stream(Path(name), events)

    def _join(self, unread: Mapping[str, _Folder]) -> Found:
        home: dict[int, tuple[str, _Stamp]] = {}  # of each job its folder, and what changes with its files
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
            if known is not None and known.stamp == stamp and known.log is not None:
                runs[name] = known
                continue
            try:
                log = join(segments)
                step = max((int(s.steps[-1]) for s in log.history.values() if len(s)), default=None)
                runs[name] = Run(name, folders, log, stamp, step, not self.local)
            except DAMAGE as error:
                problems.append(f"{name}: its parts do not fit together: {type(error).__name__}: {error}")
        for group in _alike(unread):
            name, found = " + ".join(group), [unread[folder] for folder in group]
            step = max(f.step for f in found)
            runs[name] = Run(name, tuple(group), None, _digest([f.stamp for f in found]), step, not self.local)
        self._joined = dict(sorted(runs.items(), key=lambda item: natural(item[0])))
        return Found(self._joined, tuple(dict.fromkeys(problems)))


def _alike(folders: Mapping[str, _Folder]) -> list[list[str]]:
    """Folders of one run together, in the order in which they were written."""
    groups: dict[str, list[str]] = {}
    for name in sorted(folders, key=lambda n: folders[n].latest):
        groups.setdefault(folders[name].run or f"/{name}", []).append(name)
    return list(groups.values())


def _run_id(content: bytes) -> str | None:
    """The run that a description of cells tells."""
    try:
        found = load_description(content).get("id")
    except DAMAGE:
        return None
    return found if isinstance(found, str) else None


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
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
