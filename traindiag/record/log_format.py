"""How frames, alerts and facts become TensorBoard summaries, whoever writes them.

One tag a signal, ``traindiag/<family>/<metric>``, holds float32 tensors ``[k, 1 + n]``: ``k`` samples of ``n`` cells.
Column 0 tells how many steps a sample lies before the step of its event, columns 1 to ``n`` are the values. Slow
signals write each sample by itself, fast ones in chunks. A cell that was not measured holds the NaN of bit pattern
:data:`UNSEEN`; a NaN that was measured holds the usual one. Signal and cells stand in the plugin metadata as JSON. A
reader may keep the first metadata of a tag only, so new cells open a new tag: ``<tag>/2``, ``<tag>/3``.

Where ranks matter, columns ``n + 1`` to ``2 n`` hold the rank that each value came from.

``traindiag/run``, ``traindiag/alerts``, ``traindiag/coverage`` and ``traindiag/frames`` are string tensors of JSON.
The last one tells what frames there were, with all that rules may read in them beside their readings, so that a run
can be judged once more.
"""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

from traindiag.record.alignment import Alignment
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import BoolArray, FloatArray, Frame, IntArray, Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane, Signal

VERSION = 1
PLUGIN = "traindiag"
PREFIX = "traindiag/"
RUN, ALERTS, COVERAGE, FRAMES = PREFIX + "run", PREFIX + "alerts", PREFIX + "coverage", PREFIX + "frames"

CHUNK_STEPS = 50
"""A killed job loses at most this many steps of the fast lane."""
MAX_EVENT_BYTES = 96_000
"""What one event holds unless a single sample is larger: 100 kB cost the writer 12 ms of checksums in Python."""
FAST_BYTES_PER_STEP = 2_000
"""A fast signal of more cells than this buys is written at every second, third, ... step only, and where it begins or
ceases to hold NaN or infinity."""
INLINE_BYTES = 4_000
"""A larger description is compressed, and stands in the first event of its tag only."""

UNSEEN = 0x7FC0_0ABE
_MEASURED_NAN = 0x7FC0_0000


def mark(values: FloatArray, seen: BoolArray) -> NDArray[np.float32]:
    """Float32 values in which absence is a NaN of its own.

    Example:
        >>> marked = mark(np.float32([1, np.nan, 0]), np.array([True, True, False]))
        >>> marked.tolist(), unmark(marked).tolist()
        ([1.0, nan, nan], [True, True, False])
    """
    bits = np.where(np.isnan(values), np.uint32(_MEASURED_NAN), np.ascontiguousarray(values).view(np.uint32))
    return np.where(seen, bits, np.uint32(UNSEEN)).view(np.float32)


def unmark(values: NDArray[np.float32]) -> BoolArray:
    """Which of the values that :func:`mark` made were measured."""
    return np.asarray(np.ascontiguousarray(values).view(np.uint32) != UNSEEN)


def cells_to_json(cells: Cells) -> dict[str, Any]:
    """Names once an axis; positions only where the cells are not simply all combinations.

    Example:
        >>> cells_to_json(Cells(("layer", "head"), (("a", 0), ("a", 1), ("b", 0), ("b", 1))))
        {'axes': ['layer', 'head'], 'names': [['a', 'b'], [0, 1]], 'index': None}
    """
    names = [list(dict.fromkeys(c[i] for c in cells.coordinates)) for i in range(len(cells.axes))]
    index = None
    if tuple(itertools.product(*names)) != cells.coordinates:
        places = [{c: i for i, c in enumerate(axis)} for axis in names]
        index = [[place[x] for place, x in zip(places, c)] for c in cells.coordinates]
    return {"axes": list(cells.axes), "names": names, "index": index}


def cells_from_json(data: Mapping[str, Any]) -> Cells:
    """Reads :func:`cells_to_json` back."""
    names = data["names"]
    if data["index"] is None:
        return Cells(tuple(data["axes"]), tuple(itertools.product(*names)))
    return Cells(tuple(data["axes"]), tuple(tuple(a[i] for a, i in zip(names, at)) for at in data["index"]))


def signal_from_json(data: Mapping[str, Any]) -> Signal:
    """Reads ``dataclasses.asdict`` of a signal back; fields of a newer version are left out."""
    known = {f.name for f in fields(Signal)}
    return Signal(**{**{k: v for k, v in data.items() if k in known}, "axes": tuple(data["axes"])})


def load_description(content: bytes) -> dict[str, Any]:
    """The JSON of plugin metadata, decompressed where it was too long."""
    data: dict[str, Any] = json.loads(content)
    if "zlib" in data:
        data = json.loads(zlib.decompress(base64.b64decode(data["zlib"])))
    return data


def _dump_description(data: Mapping[str, Any]) -> bytes:
    plain = _json(data)
    if len(plain) <= INLINE_BYTES:
        return plain
    return _json({"v": VERSION, "zlib": base64.b64encode(zlib.compress(plain)).decode()})


def _json(data: Any) -> bytes:
    """JSON without NaN and infinity, which other readers than Python's refuse: they become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and not np.isfinite(value):
            return repr(float(value))
        return value if isinstance(value, (str, int, float, type(None))) else str(value)

    return json.dumps(plain(data), separators=(",", ":")).encode()


def _metadata(content: bytes) -> SummaryMetadata:
    # Without a data class TensorBoard's fast loader drops the tensor silently.
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
    return SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)


def strings_value(tag: str, kind: str, strings: Sequence[bytes]) -> Summary.Value:
    """A string tensor ``[len(strings)]``."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(strings))])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=strings)
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata(_json({"v": VERSION, "kind": kind})))


class LogEncoder:
    """Turns what happens in one job of a run into ``(step, summary)`` pairs to be written in that order.

    Args:
        run_id: Identifier of the run.
        segment: Which job of the run this is.

    Example:
        >>> encoder = LogEncoder("a1b2")
        >>> frame = Frame(40, "slow", {"reward/kl": Reading.scalar(Signal("reward/kl", (), "kl"), 0.5)}, RunInfo())
        >>> [(step, [v.tag for v in summary.value]) for step, summary in encoder.frame(frame)]
        [(40, ['traindiag/reward/kl'])]
    """

    def __init__(self, run_id: str, segment: int = 0) -> None:
        self.run_id = run_id
        self.segment = segment
        self._start: int | None = None
        self._told: list[RunInfo] = []
        self._tracks: dict[str, _Track] = {}
        self._frames = _Frames()

    def run(self, info: RunInfo, step: int, lane: Lane = "slow") -> Summary:
        """What is being trained, and where this job begins: the step of the first call, at which earlier jobs end.

        Args:
            info: Facts about the run. Those of the first call hold from the beginning.
            step: The step from which on they hold.
            lane: The lane of that step with which they begin to hold; the fast one comes first.
        """
        self._start = step if self._start is None else self._start
        self._told.append(info)
        data = {"v": VERSION, "run": info.to_dict(), "id": self.run_id, "segment": self.segment, "step": self._start}
        data["from"] = [step, lane]
        return Summary(value=[strings_value(RUN, "run", [_json(data)])])

    def coverage(self, table: Sequence[Coverage]) -> Summary:
        """What is seen and what is not."""
        return Summary(value=[strings_value(COVERAGE, "coverage", [_json(row.to_dict()) for row in table])])

    def alerts(self, alerts: Sequence[Mapping[str, Any]]) -> Summary:
        """All alerts of one step, as ``Alert.to_dict`` gives them: of two summaries at one step only one is kept."""
        return Summary(value=[strings_value(ALERTS, "alerts", [_json(a) for a in alerts])])

    def frame(self, frame: Frame) -> list[tuple[int, Summary]]:
        """What a frame makes due: its own samples on the slow lane, full chunks on the fast lane."""
        due: list[tuple[int, Summary.Value]] = []
        known = any(frame.run is told for told in self._told) or frame.run in self._told
        if self._told and not known:
            due += [(frame.step, value) for value in self.run(frame.run, frame.step, frame.lane).value]
        due += self._frames.add(frame)
        for name, reading in frame.readings.items():
            track = self._tracks.get(name)
            if track is None:
                track = self._tracks[name] = _Track(self, reading)
            # a rank matters where there are several
            ranks = reading.ranks if frame.run.world_size > 1 else None
            due += track.add(frame.step, reading, ranks)
        return _pack(due)

    def flush(self) -> list[tuple[int, Summary]]:
        """The chunks that are not full yet."""
        tracks = [part for track in self._tracks.values() for part in track.flush()]
        return _pack([*tracks, *self._frames.flush()])


class _Frames:
    """What there is to know of frames beside their readings, not written yet."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, ...], int] = {}
        self.rows: list[list[Any]] = []

    def add(self, frame: Frame) -> list[tuple[int, Summary.Value]]:
        names = self.names.setdefault(tuple(frame.readings), len(self.names))
        known = frame.time, frame.seconds_per_step, dict(frame.updates), dict(frame.learning_rates)
        rest = [frame.early, list(frame.batches)] if frame.batches else [True] if frame.early else []
        self.rows.append([frame.step, frame.lane, names, *known, *rest])
        return self.flush() if len(self.rows) == CHUNK_STEPS else []

    def flush(self) -> list[tuple[int, Summary.Value]]:
        if not self.rows:
            return []
        at = self.rows[-1][0]
        data = {"v": VERSION, "names": list(self.names), "rows": self.rows}
        try:
            chunk = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
        except (ValueError, TypeError):  # a learning rate of infinity, a number of numpy's
            chunk = _json(data)
        self.names, self.rows = {}, []
        return [(at, strings_value(FRAMES, "frames", [chunk]))]


class _Track:
    """The samples of one signal that were not written yet, and its tag."""

    def __init__(self, log: LogEncoder, reading: Reading) -> None:
        self.log = log
        self.signal = reading.signal
        self.order = Alignment(reading.cells)
        self.ranks = False
        self.bad = False
        self.version = 1
        self.rows: list[tuple[FloatArray, BoolArray]] = []
        self.senders: list[IntArray] = []
        self.steps: list[int] = []
        self._describe()

    def _describe(self) -> None:
        row_bytes = 4 * (1 + len(self.order.cells) * (1 + self.ranks))
        fast = self.signal.lane == "fast"
        self.every = -(-row_bytes // FAST_BYTES_PER_STEP) if fast else 1
        self.most = max(1, min(CHUNK_STEPS, MAX_EVENT_BYTES // row_bytes)) if fast else 1
        data = {"v": VERSION, "kind": "cells", "id": self.log.run_id, "segment": self.log.segment}
        cells = cells_to_json(self.order.cells)
        data |= {"signal": asdict(self.signal), "cells": cells, "every": self.every, "ranks": self.ranks}
        self.content = _dump_description(data)
        self.described = False

    def add(self, step: int, reading: Reading, ranks: IntArray | None) -> list[tuple[int, Summary.Value]]:
        due: list[tuple[int, Summary.Value]] = []
        known = self.order.cells
        places = self.order.places(reading.cells)
        grown = len(self.order.cells) > len(known)
        if grown or (ranks is not None and not self.ranks):
            due += self.flush()
            if grown and (np.diff(places) < 0).any():  # the order of a reading says which cell is the first bad one
                self.order = Alignment(reading.cells.union(known))
            self.ranks |= ranks is not None
            self.version += bool(self.described or grown)
            self._describe()
        elif self.steps and not self.steps[0] <= step < self.steps[0] + CHUNK_STEPS:
            due += self.flush()
        bad = self.every > 1 and bool((reading.seen & ~np.isfinite(reading.values)).any())
        if step % self.every == 0 or bad != self.bad or not (self.described or self.steps):
            values, seen = self.order.spread(reading.cells, reading.values[None], reading.seen[None])
            self.rows.append((values[0], seen[0]))
            if self.ranks:
                senders = np.full(len(self.order.cells), -1, np.int64)
                if ranks is not None:
                    senders[self.order.places(reading.cells)] = ranks
                self.senders.append(senders)
            self.steps.append(step)
        self.bad = bad
        if self.steps and (len(self.steps) == self.most or step == self.steps[0] + CHUNK_STEPS - 1):
            due += self.flush()
        return due

    def flush(self) -> list[tuple[int, Summary.Value]]:
        if not self.steps:
            return []
        at = self.steps[-1]
        n = len(self.rows[0][0])  # there may be more cells by now
        table = np.empty((len(self.rows), 1 + n * (1 + bool(self.senders))), np.float32)
        table[:, 0] = at - np.array(self.steps)
        values, seen = (np.stack(columns) for columns in zip(*self.rows))
        table[:, 1 : 1 + n] = mark(values, seen)
        if self.senders:
            table[:, 1 + n :] = self.senders
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in table.shape])
        value = Summary.Value(
            tag=PREFIX + self.signal.name + (f"/{self.version}" if self.version > 1 else ""),
            tensor=TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=table.astype("<f4").tobytes()),
        )
        if not self.described or len(self.content) <= INLINE_BYTES:
            value.metadata.CopyFrom(_metadata(self.content))
            self.described = True
        self.rows, self.senders, self.steps = [], [], []
        return [(at, value)]


def _pack(due: Sequence[tuple[int, Summary.Value]]) -> list[tuple[int, Summary]]:
    """As few events as their size allows: each one costs the writer a file opened anew."""
    packed: list[tuple[int, Summary]] = []
    room = 0
    for step, value in sorted(due, key=lambda pair: pair[0]):
        size = value.ByteSize()
        if not packed or packed[-1][0] != step or size > room:
            packed.append((step, Summary()))
            room = MAX_EVENT_BYTES
        packed[-1][1].value.append(value)
        room -= size
    return packed
