"""What is written comes back bit for bit, and TensorBoard's own reader sees the same."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_ndarray

from traindiag.record import log_format
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import read_log, read_logs
from traindiag.record.log_format import LogEncoder, cells_from_json, cells_to_json
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.record.signal import Signal

LOGITS = Signal("attention/max_logit", ("layer", "head"), "largest logit", source="a paper")
NORM = Signal("gradient/norm", ("optimizer",), "norm", lane="fast", clock="fast", positive=True)
GRID = Cells(("layer", "head"), tuple((f"blocks.{i}", j) for i in range(3) for j in range(4)))
ADAM = Cells.along("optimizer", ["adam"])
RUN = RunInfo(run_id="r1", model="GPT", length=500, optimizers=(OptimizerInfo("adam", "AdamW", {"lr": 1e-3}),))


def slow(step: int, values: np.ndarray, seen: np.ndarray, cells: Cells = GRID) -> Frame:
    return Frame(step, "slow", {LOGITS.name: Reading(LOGITS, cells, values, seen)}, RUN)


def fast(step: int, value: float) -> Frame:
    reading = Reading(NORM, ADAM, np.array([value], np.float32), np.ones(1, bool))
    return Frame(step, "fast", {NORM.name: reading}, RUN)


class Writer:
    """Writes what an encoder gives, as a panel does."""

    def __init__(self, folder: Path, encoder: LogEncoder) -> None:
        self.encoder = encoder
        self.file = EventFileWriter(str(folder))

    def put(self, step, *summaries):
        for summary in summaries:
            self.file.add_event(Event(step=step, summary=summary, wall_time=1.0))

    def frame(self, frame):
        for step, summary in self.encoder.frame(frame):
            self.put(step, summary)

    def close(self):
        for step, summary in self.encoder.flush():
            self.put(step, summary)
        self.file.close()


def write(folder: Path, steps: range, segment: int = 0, run: str = "r1", scale: float = 1.0) -> None:
    writer = Writer(folder, LogEncoder(run, segment))
    info = RunInfo(run_id=run, length=500)
    writer.put(steps[0], writer.encoder.run(info, steps[0]))
    for step in steps:
        writer.frame(replace(fast(step, scale * step), run=info))
        if step % 10 == 0:
            writer.frame(replace(slow(step, np.full(12, scale * step, np.float32), np.ones(12, bool)), run=info))
            writer.put(step, writer.encoder.alerts([{"id": f"x{step}", "step": step, "segment": segment}]))
    writer.close()


def test_a_whole_run_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    writer = Writer(tmp_path, LogEncoder("r1"))
    writer.put(0, writer.encoder.run(RUN, 0))
    table = [Coverage("attention", "exact", ("blocks.0",)), Coverage("output", "unseen", ("head",), "fused loss")]
    writer.put(0, writer.encoder.coverage(table))
    logits, seen, norms = {}, {}, {}
    for step in range(123):
        norms[step] = rng.normal()
        writer.frame(fast(step, norms[step]))
        if step % 10 == 0:
            logits[step] = rng.normal(size=12).astype(np.float32)
            logits[step][:3] = math.nan, math.inf, -math.inf
            seen[step] = rng.random(12) < 0.7
            writer.frame(slow(step, logits[step], seen[step]))
    alert = {"id": "a", "step": 40, "value": "nan", "title": "größer als 1e3"}
    writer.put(40, writer.encoder.alerts([alert, {**alert, "id": "b"}]))
    writer.close()

    log = read_log(tmp_path)
    assert log.run == RUN
    assert log.coverage == tuple(table)
    assert log.alerts == (alert, {**alert, "id": "b"})
    assert (log.segments, log.problems) == ((0,), ())
    series = log.history["attention/max_logit"]
    assert series.signal == LOGITS
    assert series.cells == GRID
    assert series.steps.tolist() == list(logits)
    assert np.array_equal(series.seen, np.array(list(seen.values())))
    there = series.seen
    assert np.array_equal(series.values[there], np.array(list(logits.values()))[there], equal_nan=True)
    norm = log.history["gradient/norm"]
    assert norm.signal == NORM
    assert norm.steps.tolist() == list(range(123))
    assert norm.values[:, 0].tolist() == np.float32(list(norms.values())).tolist()


def test_tensorboards_reader_sees_the_same_numbers_in_few_events(tmp_path):
    write(tmp_path, range(120))
    tensorboard = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    chunks = tensorboard.Tensors("traindiag/gradient/norm")
    assert [c.step for c in chunks] == [49, 99, 119]
    steps = [c.step - back for c in chunks for back in make_ndarray(c.tensor_proto)[:, 0]]
    values = [v for c in chunks for v in make_ndarray(c.tensor_proto)[:, 1]]
    ours = read_log(tmp_path).history["gradient/norm"]
    assert steps == ours.steps.tolist()
    assert values == ours.values[:, 0].tolist()
    metadata = tensorboard.SummaryMetadata("traindiag/gradient/norm")
    assert metadata.data_class == 2  # tensor; unset, the fast loader drops it
    assert tensorboard.PluginTagToContent("traindiag").keys() == set(tensorboard.Tags()["tensors"])
    assert json.loads(metadata.plugin_data.content)["signal"]["name"] == "gradient/norm"
    samples = tensorboard.Tensors("traindiag/attention/max_logit")
    assert [s.step for s in samples] == list(range(0, 120, 10))
    assert make_ndarray(samples[3].tensor_proto).tolist() == [[0.0] + 12 * [30.0]]


names = st.sampled_from(["a", "b.0", "ü", 0, 3, -1])
grids = st.integers(1, 3).flatmap(
    lambda k: st.lists(st.tuples(*[names] * k), unique=True, max_size=8).map(
        lambda c: Cells(tuple("xyz"[:k]), tuple(c))
    )
)


@given(st.just(Cells.single()) | st.just(GRID) | grids)
def test_cells_survive_json(cells):
    assert cells_from_json(json.loads(json.dumps(cells_to_json(cells)))) == cells


def test_new_cells_open_a_new_tag_and_known_ones_in_any_order_do_not(tmp_path):
    encoder = LogEncoder("r1")
    part = Cells(GRID.axes, GRID.coordinates[2:7][::-1])
    more = Cells(GRID.axes, (("blocks.9", 0), *GRID.coordinates))
    writer = Writer(tmp_path, encoder)
    tags = []
    for step, cells in enumerate((GRID, part, GRID, more, GRID)):
        values = np.array([hash(c) % 97 for c in cells.coordinates], np.float32)
        for at, summary in encoder.frame(slow(step, values, np.ones(len(cells), bool), cells)):
            tags += [v.tag for v in summary.value]
            writer.put(at, summary)
    writer.close()
    assert tags == 3 * ["traindiag/attention/max_logit"] + 2 * ["traindiag/attention/max_logit/2"]
    series = read_log(tmp_path).history["attention/max_logit"]
    assert series.cells.coordinates == (*GRID.coordinates, ("blocks.9", 0))
    assert series.seen.sum(axis=1).tolist() == [12, 5, 12, 13, 12]
    expected = np.array([hash(c) % 97 for c in series.cells.coordinates], np.float32)
    assert (series.values == expected)[series.seen].all()


def test_events_stay_small_however_many_cells_the_fast_lane_has():
    for count in (1, 300, 3_000, 27_000):
        names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(count)]
        cells = Cells.along("parameter", names)
        signal = Signal("gradient/parameter_norm", ("parameter",), "norm", lane="fast")
        encoder, events = LogEncoder("r1"), []
        for step in range(200):
            reading = Reading(signal, cells, np.full(count, step, np.float32), np.ones(count, bool))
            events += encoder.frame(Frame(step, "fast", {signal.name: reading}, RUN))
        events += encoder.flush()
        later = [s.ByteSize() for _, s in events[1:]]  # the first one names the cells
        assert max(later) <= max(log_format.MAX_EVENT_BYTES + 2_000, 4 * count + 4_000)
        assert sum(later) / 200 <= 1.5 * log_format.FAST_BYTES_PER_STEP
        assert events[0][1].ByteSize() <= 4 * count + 250_000
        if count <= 300:
            assert (
                sum(v.tensor.tensor_shape.dim[0].size for _, s in events for v in s.value if v.tag.endswith("_norm"))
                == 200
            )


def test_a_resumed_run_in_several_folders_is_one_run(tmp_path):
    write(tmp_path / "version_1", range(35, 80), segment=1, scale=2)
    write(tmp_path / "version_0", range(60), segment=0)
    write(tmp_path / "version_2", range(35, 70), segment=1, scale=3)  # crashed and resumed from there once more
    shutil.move(tmp_path / "version_2", tmp_path / "a_version")
    log = read_log(tmp_path)
    norm = log.history["gradient/norm"]
    assert norm.steps.tolist() == list(range(len(norm)))
    assert norm.segments.tolist() == [0] * 35 + [1] * (len(norm) - 35)
    assert norm.values[:35, 0].tolist() == list(range(35))
    assert len(set((norm.values[36:, 0] / norm.steps[36:]).tolist())) == 1
    assert [a["step"] for a in log.alerts if a["step"] < 35] == [0, 10, 20, 30]
    assert len({a["step"] for a in log.alerts}) == len(log.alerts)
    assert log.segments == (0, 1)


def test_the_first_sample_of_a_segment_ends_slow_signals_of_the_one_before(tmp_path):
    write(tmp_path / "version_0", range(60))
    write(tmp_path / "version_1", range(35, 38), segment=1)  # too short for a slow sample of its own
    log = read_log(tmp_path)
    assert log.history["attention/max_logit"].steps.tolist() == [0, 10, 20, 30]
    assert [a["step"] for a in log.alerts] == [0, 10, 20, 30]


def test_several_runs_must_be_chosen_from(tmp_path):
    write(tmp_path / "a", range(10), run="first")
    write(tmp_path / "b", range(20), run="second")
    with pytest.raises(ValueError, match=r"2 runs.*first.*second"):
        read_log(tmp_path)
    assert len(read_log(tmp_path, run="second").history["gradient/norm"]) == 20
    with pytest.raises(ValueError, match=r"no run 'frist'.*Did you mean 'first'"):
        read_log(tmp_path, run="frist")
    assert {log.run.run_id for log in read_logs(tmp_path)} == {"first", "second"}


def test_folders_without_our_log_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_log(tmp_path / "nowhere")
    EventFileWriter(str(tmp_path)).close()
    (tmp_path / "events.out.tfevents.0.empty").touch()
    with pytest.raises(ValueError, match="none of the 2 event files"):
        read_log(tmp_path)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("log")
    write(folder, range(200))
    return next(folder.iterdir()).read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncation_gives_what_lies_before_it(file, tmp_path_factory, data):
    cut = data.draw(st.integers(3_000, len(file) - 1))
    path = tmp_path_factory.mktemp("cut") / "events.out.tfevents.1"
    path.write_bytes(file[:cut])
    log = read_log(path)
    slow = log.history["attention/max_logit"]
    assert slow.values[:, 0].tolist() == slow.steps.tolist() == list(range(0, 10 * len(slow), 10))
    assert all("incomplete" in p for p in log.problems)


def test_a_cut_tail_is_told(file, tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(file[:-5])
    (problem,) = read_log(tmp_path).problems
    assert "incomplete" in problem


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_costs_some_records_and_never_the_rest(file, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(file) - 20))
    noise = data.draw(st.binary(min_size=1, max_size=16))
    path = tmp_path_factory.mktemp("damage") / "events.out.tfevents.1"
    path.write_bytes(file[:at] + noise + file[at + len(noise) :])
    log = read_log(path)
    # Values inside a payload may change unseen, for checksums are skipped; nothing else may.
    slow, fast = log.history["attention/max_logit"], log.history["gradient/norm"]
    assert len(slow) >= 18
    assert set(slow.steps.tolist()) <= set(range(0, 200, 10))
    assert len(fast) >= 150
    assert set(fast.steps.tolist()) <= set(range(200))


def test_a_damaged_length_is_told_and_skipped(file, tmp_path):
    marker = file.index(b"traindiag/attention/max_logit", len(file) // 2)
    start = max(i for i in range(marker - 200, marker) if file[i + 3 : i + 8] == bytes(5) and file[i] > 0)
    damaged = bytearray(file)
    damaged[start : start + 8] = b"\xff" * 8
    (tmp_path / "events.out.tfevents.1").write_bytes(bytes(damaged))
    log = read_log(tmp_path)
    assert any("damaged bytes" in p for p in log.problems)
    assert 15 <= len(log.history["attention/max_logit"]) < 20
    assert log.history["attention/max_logit"].steps[-1] == 190


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x10\x64*", b"\x10\x0a*"),  # step 100 becomes 10, and would roll back all that lies between
        (b'"name":"attention/max_logit"', b'"name":"attention/max_logic"'),
        (b'"id":"r1","segment":0', b'"id":"r2","segment":0'),
    ],
)
def test_damage_that_still_parses_is_found_by_its_checksum(file, tmp_path, old, new):
    middle = len(file) * 2 // 5
    at = file.index(old, middle)
    (tmp_path / "events.out.tfevents.1").write_bytes(file[:at] + new + file[at + len(old) :])
    log = read_log(tmp_path)
    assert set(log.history) == {"attention/max_logit", "gradient/norm"}
    lost = 200 - len(log.history["gradient/norm"]) + 50 * (20 - len(log.history["attention/max_logit"]))
    assert lost in (0, 50)  # one record at most; an alert may be the one
    assert any("damaged bytes" in p for p in log.problems)


def test_a_newer_format_is_told_and_not_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(log_format, "VERSION", 2)
    write(tmp_path, range(20))
    log = read_log(tmp_path)
    assert len(log.history) == 0
    assert any("format 2 is newer" in p for p in log.problems)


def test_numbers_that_json_lacks_survive_as_strings():
    encoder = LogEncoder("r1")
    info = RunInfo(run_id="r1", optimizers=(OptimizerInfo("o", "SGD", {"lr": math.inf, "kind": object}),))
    text = encoder.run(info, 0).value[0].tensor.string_val[0]
    parsed = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert parsed["run"]["optimizers"][0]["settings"]["lr"] == "inf"


def test_reading_needs_no_torch():
    code = "import sys, traindiag.record.log, traindiag.record.series; print({'torch', 'lightning'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
