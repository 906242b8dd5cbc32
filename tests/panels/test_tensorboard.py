"""What TensorBoard's own reader finds in a run, and what happens when nothing can be written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from traindiag.alerts.alert import Alert
from traindiag.panels.aggregates import MAX_TAGS, Aggregates
from traindiag.panels.layout import PINNED, layout_summary, links
from traindiag.panels.sinks import FileSink, WriterSink
from traindiag.panels.tensorboard import TensorBoardPanels
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import read_log
from traindiag.record.run_info import RunInfo

HEADS = Cells(("layer", "head"), tuple((f"blocks.{i}", j) for i in range(2) for j in range(3)))
SITES = Cells.along("site", ["training_step"])
ADAM = Cells.along("optimizer", ["adam"])
ATTENTION = [n for n in BY_NAME if n.startswith("attention/")]
RUN = RunInfo(run_id="r1", length=100)


def alert(step, severity="warning", status="opened", id="a", title="Logits grow"):
    return Alert(
        id, status, "rule", "r1", 0, step, 5.0, None, severity, "slow", "attention", "attention/max_logit",
        "blocks.0 head 1", float("inf"), 1e4, "threshold", title=title,
    )  # fmt: skip


def frames(steps):
    for step in steps:
        names = ("gradient/norm", "loss/value")
        one = np.ones(1, bool)
        readings = {n: Reading(BY_NAME[n], ADAM, np.array([step], np.float32), one) for n in names}
        yield Frame(step, "fast", readings, RUN, time=100.0 + step, learning_rates={"adam": 0.1})
        if step % 10 == 0:
            values = np.arange(6, dtype=np.float32) + step
            readings = {n: Reading(BY_NAME[n], HEADS, values, np.ones(6, bool)) for n in ATTENTION}
            readings |= {n: Reading(BY_NAME[n], SITES, values[:1], one) for n in ("output/log_z", "output/z_loss")}
            yield Frame(step, "slow", readings, RUN, time=100.0 + step)


def play(panels, steps=range(100)):
    panels.start(RUN, steps[0])
    panels.coverage([Coverage("attention", "exact", ("blocks.0", "blocks.1"))], steps[0])
    for frame in frames(steps):
        panels.frame(frame)
        if frame.lane == "slow" and frame.step == 40:
            panels.alerts([alert(40), alert(40, id="b", severity="info", title="Other")], 40)
            panels.alerts([alert(40, "critical", "escalated")], 40)
        if frame.lane == "slow" and frame.step == 70:
            panels.alerts([alert(70, "critical", "closed")], 70)
    panels.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    play(TensorBoardPanels(FileSink(folder), "r1"))
    return folder


@pytest.fixture(scope="module")
def read(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def text(event):
    return event.tensor_proto.string_val[0].decode()


def test_one_file_holds_few_scalars_and_the_whole_log(folder, read):
    assert len(os.listdir(folder)) == 1
    assert len(read.Tags()["scalars"]) <= 20 < MAX_TAGS
    largest = read.Scalars("diag_attention/max_logit")
    assert [(e.step, e.value, e.wall_time) for e in largest] == [(s, s + 5, 100 + s) for s in range(0, 100, 10)]
    assert [e.value for e in read.Scalars("diag_loss/value")] == [0, *range(10, 100, 10), 99]
    log = read_log(folder)
    assert log.history["loss/value"].steps.tolist() == list(range(100))
    assert set(log.history) == {*ATTENTION, "output/log_z", "output/z_loss", "gradient/norm", "loss/value"}
    assert [Alert.from_dict(a) for a in log.alerts][2] == alert(40, "critical", "escalated")


def test_severity_follows_the_open_events(read):
    severity = {e.step: e.value for e in read.Scalars("diag_alerts/severity")}
    assert [severity[s] for s in (0, 30, 40, 41, 60, 70, 80, 90)] == [0, 0, 1, 2, 2, 0, 0, 0]


def test_steps_of_a_tag_only_rise_so_that_the_fast_loader_drops_nothing(read):
    for tag in read.Tags()["tensors"]:
        steps = [e.step for e in read.Tensors(tag)]
        assert steps == sorted(set(steps)) or tag == "traindiag/run", tag
    for tag in read.Tags()["scalars"]:
        steps = [e.step for e in read.Scalars(tag) if tag != "diag_alerts/severity"]
        assert steps == sorted(set(steps)), tag


def test_alerts_are_text_newest_first(read):
    first, second, third = map(text, read.Tensors("diag_alerts/feed"))
    assert first.index("INFO") < first.index("WARNING")
    assert "CRITICAL" in second
    assert "closed" in third
    assert "- **attention** exact, 2: " in text(read.Tensors("diag_run/coverage")[0])
    metadata = read.SummaryMetadata("diag_alerts/feed")
    assert (metadata.plugin_data.plugin_name, metadata.data_class) == ("text", 2)


def test_each_chart_of_the_layout_matches_tags_that_exist_and_no_others_by_accident(read):
    (event,) = read.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
    (category,) = layout.category
    scalars = read.Tags()["scalars"]
    for chart in category.chart:
        for pattern in chart.multiline.tag:
            assert pattern.endswith("$")
            found = [t for t in scalars if re.match(pattern, t)]
            assert 1 <= len(found) <= 2, (chart.title, pattern)
    assert not any(re.match(p, "diag_attention/max_logit_bound") for c in category.chart for p in c.multiline.tag)


def test_charts_of_other_families_are_there_where_they_are_measured_and_match_their_tags():
    names = {"plasticity": ("fau_pooled", "fau_fresh", "q_bound_ratio"), "stability": ("gap_depth", "loss")}
    cells = {"plasticity": Cells.along("module", ["a", "b"]), "stability": Cells.along("task", ["a", "b"])}
    for family, signals in names.items():
        tags: list[str] = []
        for name in signals:
            signal = BY_NAME[f"{family}/{name}"]
            reading = Reading(signal, cells[family], np.float32([1, 2]), np.array([True, True]))
            tags += Aggregates().update(Frame(5, "active", {signal.name: reading}, RunInfo()))
        usual, more = (charts_of(layout_summary(families)) for families in ((), {family, "attention"}))
        assert not set(more[: len(usual)]) - set(usual) and len(more) == len(usual) + 2
        for _, patterns in more[len(usual) :]:
            assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), patterns


def charts_of(summary):
    layout = layout_pb2.Layout.FromString(summary.value[0].tensor.string_val[0])
    return [(chart.title, tuple(chart.multiline.tag)) for chart in layout.category[0].chart]


def test_the_link_pins_cards_that_exist(read):
    command, tab, link = links("logs/my run", "logs/my run/a&b/version_0")
    assert tab == "http://localhost:6006/#traindiag&p.traindiag.run=a%26b%2Fversion_0"
    assert links("logs", "logs")[1].endswith("#traindiag&p.traindiag.run=.")
    assert links("logs")[1].endswith("#traindiag") and links("logs", "elsewhere")[1].endswith("#traindiag")
    assert command == "tensorboard --logdir 'logs/my run'"
    pinned = json.loads(parse_qs(urlparse(link).query)["pinnedCards"][0])
    assert [c["tag"] for c in pinned] == list(PINNED)
    assert set(PINNED) <= set(read.Tags()["scalars"])
    assert links("a", port=1234)[0].endswith("--port 1234")


def test_a_layout_of_the_users_own_can_be_kept(tmp_path):
    play(TensorBoardPanels(FileSink(tmp_path), "r1", layout=False))
    assert "custom_scalars__config__" not in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]


def test_the_writer_of_the_logger_is_used_and_no_file_opened_beside_it(tmp_path):
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("theirs", 1.0, 0)
    play(TensorBoardPanels(WriterSink(writer), "r1"))
    writer.add_scalar("theirs", 2.0, 1)
    writer.close()
    problems = []
    late = TensorBoardPanels(WriterSink(writer), "r1", on_problem=problems.append)
    play(late)
    assert len(os.listdir(tmp_path)) == 1
    assert len(problems) == 1
    assert "closed" in problems[0]
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in read.Scalars("theirs")] == [1.0, 2.0]
    assert len(read_log(tmp_path).history["loss/value"]) == 100


def test_nothing_is_made_before_the_first_write(tmp_path):
    sink = FileSink(tmp_path / "log")
    TensorBoardPanels(sink, "r1").close()
    assert not (tmp_path / "log").exists()


def test_a_place_that_cannot_be_written_is_told_once_and_raises_nothing(tmp_path):
    (tmp_path / "file").touch()
    problems = []
    play(TensorBoardPanels(FileSink(tmp_path / "file" / "log"), "r1", on_problem=problems.append))
    assert len(problems) == 1
    assert "training goes on" in problems[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_is_told_once_and_raises_nothing(tmp_path, monkeypatch):
    problems, sink = [], FileSink(tmp_path)
    panels = TensorBoardPanels(sink, "r1", on_problem=problems.append)
    panels.start(RUN, 0)
    panels.flush()

    def full(data):
        raise OSError(28, "No space left on device")

    writer = sink._writer._async_writer
    monkeypatch.setattr(writer._writer, "write", full)
    play(panels)
    writer._worker.join(timeout=10)  # its death belongs to this test and not to the next one
    assert not writer._worker.is_alive()
    assert len(problems) == 1
    assert "No space left" in problems[0]


def test_aggregates_are_handed_to_other_loggers_even_when_the_disk_is_full(tmp_path):
    (tmp_path / "file").touch()
    panels = TensorBoardPanels(FileSink(tmp_path / "file"), "r1")
    points = [panels.frame(f) for f in frames(range(11))]
    assert points[-1]["diag_attention/max_logit"] == 15
    assert points[-1]["diag_alerts/severity"] == 0


def test_run_facts_may_be_told_again_without_moving_the_start(tmp_path):
    first = TensorBoardPanels(FileSink(tmp_path / "0"), "r1")
    play(first, range(60))
    second = TensorBoardPanels(FileSink(tmp_path / "1"), "r1", segment=1)
    second.start(RUN, 35)
    second.start(RunInfo(run_id="r1", length=100, depth=7), 50)
    for frame in frames(range(35, 80)):
        second.frame(frame)
    second.close()
    log = read_log(tmp_path)
    assert log.run.depth == 7
    assert log.history["loss/value"].segments.tolist() == [0] * 35 + [1] * 45


def test_panels_need_no_torch():
    panels = "traindiag.panels.tensorboard, traindiag.panels.terminal"
    code = f"import sys, {panels}; print({{'torch', 'lightning'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
