"""Frames come back from a log as they were judged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tests.record.test_log import ADAM, GRID, LOGITS, NORM, RUN, Writer
from traindiag.playback.replay import replay
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import read_log
from traindiag.record.log_format import LogEncoder
from traindiag.record.recording import read_recordings
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane, Signal

TWO = RunInfo(run_id="r1", world_size=2)


def reading(signal: Signal, cells: Cells, values: list[float], ranks: list[int] | None = None) -> Reading:
    there = np.array([v is not None for v in values])
    numbers = np.array([math.nan if v is None else v for v in values], np.float32)
    return Reading(signal, cells, numbers, there, None if ranks is None else np.array(ranks))


def frame(step: int, lane: Lane, *readings: Reading, run: RunInfo = RUN, **known: object) -> Frame:
    return Frame(step, lane, {r.signal.name: r for r in readings}, run, **known)  # type: ignore[arg-type]


def back(folder: Path, frames: list[Frame], start: int = 0, segment: int = 0) -> list[Frame]:
    writer = Writer(folder, LogEncoder("r1", segment))
    writer.put(start, writer.encoder.run(frames[0].run, start))
    for f in frames:
        writer.frame(f)
    writer.close()
    (recording,) = read_recordings(folder)
    return list(recording.frames())


def told(f: Frame) -> tuple[object, ...]:
    """All that a rule can see."""
    readings = [
        (name, r.signal, [(c, s, repr(float(v))) for c, v, s in zip(r.cells.coordinates, r.values, r.seen) if s])
        for name, r in f.readings.items()
    ]
    ranks = [None if r.ranks is None else r.ranks.tolist() for r in f.readings.values()]
    facts = (f.time, f.seconds_per_step, dict(f.updates), dict(f.learning_rates), f.segment)
    return f.step, f.lane, f.run, facts, readings, ranks


def test_every_field_of_every_frame(tmp_path: Path) -> None:
    frames = []
    for step in range(130):
        rates = {"adam": 0.1 / (step + 3), "other": math.inf if 60 < step < 64 else 1.0}
        known = {"time": 1e9 + step / 7, "seconds_per_step": step / 3 if step else None, "updates": {"adam": step}}
        norm = reading(NORM, ADAM, [math.nan if step == 50 else step])
        own = reading(Signal("reward/kl", (), "own", lane="fast"), Cells.single(), [1.5])
        parts = [own, norm] if step % 2 else [norm] if step % 3 else []  # no frame is left out, an empty one neither
        frames.append(frame(step, "fast", *parts, learning_rates=rates, **known))
        if step % 10 == 0:
            values = [None if (i + step) % 5 == 0 else step + i / 7 for i in range(12)]
            frames.append(frame(step, "slow", reading(LOGITS, GRID, values), time=2e9 + step))
    assert [told(f) for f in back(tmp_path, frames)] == [told(f) for f in frames]


def test_facts_that_become_known_hold_from_their_frame_on(tmp_path: Path) -> None:
    more = replace(RUN, batch_size=8)
    frames = [frame(s, "fast", reading(NORM, ADAM, [1.0]), run=RUN if s < 2 else more) for s in range(4)]
    assert [f.run.batch_size for f in back(tmp_path, frames)] == [None, None, 8, 8]
    assert read_log(tmp_path).run.batch_size == 8


def test_ranks_are_kept_where_there_are_several(tmp_path: Path) -> None:
    cells = Cells.along("layer", ["a", "b"])
    signal = Signal("activation/max", ("layer",), "largest")
    frames = [
        frame(0, "slow", reading(signal, cells, [1.0, 2.0]), run=TWO),
        frame(1, "slow", reading(signal, cells, [1.0, None], [1, -1]), run=TWO),
        frame(2, "slow", reading(signal, cells, [3.0, 4.0], [0, 1]), run=TWO),
    ]
    found = [f.readings["activation/max"].ranks for f in back(tmp_path, frames)]
    assert found[0] is None
    assert [r.tolist() for r in found[1:] if r is not None] == [[1, -1], [0, 1]]
    assert read_log(tmp_path).history["activation/max"].values.shape == (3, 2)
    one = [frame(0, "slow", reading(signal, cells, [1.0, 2.0], [0, 0]))]
    (single,) = back(tmp_path / "one", one)
    assert single.readings["activation/max"].ranks is None  # of one rank there is nothing to tell


def test_cells_that_join_in_the_middle_stand_there_again(tmp_path: Path) -> None:
    signal = Signal("gradient/parameter_norm", ("parameter",), "norm", lane="fast")
    before, after = Cells.along("parameter", ["a", "z"]), Cells.along("parameter", ["a", "m", "z"])
    frames = [
        frame(0, "fast", reading(signal, before, [1.0, 2.0])),
        frame(1, "fast", reading(signal, after, [1, 2, 3])),
    ]
    assert [f.readings[signal.name].cells for f in back(tmp_path, frames)] == [before, after]


def test_of_a_signal_with_very_many_cells_the_steps_where_nan_begins_and_ends_are_kept(tmp_path: Path) -> None:
    cells = Cells.along("parameter", range(3000))
    signal = Signal("gradient/parameter_norm", ("parameter",), "norm", lane="fast")
    bad = {17, 18, 19, 20}
    frames = []
    for step in range(40):
        values = [1.0] * 3000
        if step in bad:
            values[1234] = math.nan
        frames.append(frame(step, "fast", reading(signal, cells, values), reading(NORM, ADAM, [1.0])))
    kept = [f.step for f in back(tmp_path, frames) if signal.name in f.readings]
    assert {17, 21} <= set(kept) and len(kept) < 12
    (run,) = replay(tmp_path).runs
    (alert,) = run.alerts
    assert (alert.step, alert.where) == (17, "parameter 1234")
    assert any("one step in 7" in note for note in run.notes)


def test_a_signal_on_the_other_lane_stays_there(tmp_path: Path) -> None:
    frames = [frame(0, "fast", reading(LOGITS, GRID, [1.0] * 12)), frame(0, "slow", reading(NORM, ADAM, [1.0]))]
    assert [(f.lane, list(f.readings)) for f in back(tmp_path, frames)] == [
        ("fast", ["attention/max_logit"]),
        ("slow", ["gradient/norm"]),
    ]


def test_logs_without_a_record_of_frames_still_give_theirs(tmp_path: Path) -> None:
    encoder = LogEncoder("r1")
    file = EventFileWriter(str(tmp_path))
    writer = Writer(tmp_path / "unused", encoder)
    writer.file.close()
    writer.file = file
    for step in range(3):
        writer.frame(frame(step, "fast", reading(NORM, ADAM, [step])))
        writer.frame(frame(step, "slow", reading(LOGITS, GRID, [step] * 12)))
    encoder._frames.rows.clear()
    writer.close()
    (recording,) = read_recordings(tmp_path)
    assert [(f.step, f.lane) for f in recording.frames()] == [
        (s, lane) for s in range(3) for lane in ("fast", "slow")
    ]


def test_what_a_later_job_went_through_again_counts_once(tmp_path: Path) -> None:
    for segment, steps in ((0, range(30)), (1, range(20, 40)), (2, range(10, 15))):
        frames = [frame(s, "fast", reading(NORM, ADAM, [segment]), segment=segment) for s in steps]
        writer = Writer(tmp_path / str(segment), LogEncoder("r1", segment))
        writer.put(steps[0], writer.encoder.run(RUN, steps[0]))
        writer.put(steps[0], writer.encoder.alerts([{"step": s, "segment": segment} for s in steps]))
        for f in frames:
            writer.frame(f)
        writer.close()
    (recording,) = read_recordings(tmp_path)
    assert [(f.step, f.segment) for f in recording.frames()] == [(s, 0 if s < 10 else 2) for s in range(15)]
    assert [a["step"] for a in recording.alerts] == list(range(15))
