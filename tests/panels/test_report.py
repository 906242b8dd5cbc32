"""The report: one file that opens offline, says what happened, and lets nothing in that is markup or secret."""

from __future__ import annotations

import json
import math
import re
import sys
import time
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.panels.browser import dom
from tests.panels.logs import HOSTILE, alert, write_log
from tests.panels.test_figures_panels import hostile
from traindiag.cli import app
from traindiag.panels.figures.style import PALETTES, SCALES
from traindiag.panels.report.at_the_end import hand_to_wandb, write_report
from traindiag.panels.report.markdown import markdown_report
from traindiag.panels.report.page import dark_colours, html_page, rendered
from traindiag.panels.report.redaction import redacted
from traindiag.panels.report.story import Report, reported
from traindiag.playback.reading import read
from traindiag.playback.report import make_report
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import read_log
from traindiag.record.run_info import OptimizerInfo, RunInfo


class Parsed(HTMLParser):
    """Tags, what they point to, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.data: dict[str, Any] = {}
        self._in: str = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "action", "data", "poster", "srcset")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        self._in = f"{tag}#{known.get('id', '')}"

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in.startswith("script#") and self._in != "script#":
            self.data[self._in.removeprefix("script#")] = json.loads(data)
        elif not self._in.startswith(("script", "style")):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was warned at step 50, and whose loss rises at step 300."""
    folder = tmp_path_factory.mktemp("logs") / "failing"
    info = RunInfo(
        run_id="r1", model="GPT", parameters=1000, length=400, seed=7,
        optimizers=(OptimizerInfo("AdamW", "AdamW", {"lr": 0.1, "eps": 1e-8}, peak_lr=0.1),),
    )  # fmt: skip

    def loss(step: int) -> float:
        return 4.0 * 0.99**step + 1.0 + 0.02 * np.sin(step * 7.0) + (2.0 if step >= 300 else 0.0)

    write_log(folder, range(400), run=info, alerts=[alert(50), alert(310, id="2", title="Later")], loss=loss)
    return folder


def one(folder: Path) -> Report:
    return make_report(folder)


def test_it_says_how_much_later_the_loss_showed_it(logdir: Path) -> None:
    report = one(logdir)
    loss = report.runs[0].loss
    assert loss is not None
    assert (loss.judged, loss.shown, loss.how, loss.six_sigma) == (400, 300, "rose and stayed", 300)
    words = Parsed(html_page(report)).text
    for told in ("step 50", "250 steps later", "step 300: it rose and stayed", "Attention logits are too large"):
        assert told in words, told
    assert "norms grew" in words and "Lower the rate." in words and "a shift" in words
    text = markdown_report(report)
    assert "| The loss showed it | 250 steps later | step 300: it rose and stayed |" in text
    assert "| A 6-sigma rule on the loss | 250 steps later | step 300 |" in text


@pytest.mark.parametrize(
    ("alerts", "said"),
    [
        ([], "Missed: the loss rose and stayed at step 300, and nothing had warned of it."),
        ([alert(350)], "Late: the loss rose and stayed at step 300, the first warning came at step 350."),
        ([alert(350, severity="info")], "Missed: the loss rose and stayed at step 300"),
    ],
)
def test_misses_are_said_first(tmp_path: Path, alerts: list[Any], said: str) -> None:
    write_log(tmp_path, range(400), alerts=alerts, loss=lambda s: 4 * 0.99**s + 1 + 2 * (s >= 300))
    report = one(tmp_path)
    assert said in Parsed(html_page(report)).text
    assert said in markdown_report(report)


@pytest.mark.parametrize(
    ("told", "shown", "how"),
    [
        ([], 300, "rose and stayed"),
        ([alert(120, id="j", signal="loss/value", severity="info", kind="spike")], 120, "jumped"),
        ([alert(120, id="j", signal="loss/value", kind="nonfinite")], 300, "rose and stayed"),
    ],
)
def test_what_comes_first_is_when_the_loss_showed_it(tmp_path: Path, told: list[Any], shown: int, how: str) -> None:
    def loss(step: int) -> float:
        return math.nan if step == 390 else 4 * 0.99**step + 1 + 2 * (step >= 300)

    write_log(tmp_path, range(400), alerts=told, loss=loss)
    found = one(tmp_path).runs[0].loss
    assert found is not None and (found.shown, found.how) == (shown, how)


def test_a_silent_run_is_not_called_healthy_where_nothing_was_seen(tmp_path: Path) -> None:
    write_log(tmp_path, range(100))
    words = Parsed(html_page(one(tmp_path))).text
    assert "Nothing at warning or above was found." in words
    assert "Not seen at all, so that silence means nothing there: output, gradient, optimizer, activation." in words
    assert "it needs 129 losses" in words


def test_figures_hold_the_numbers_of_the_log(logdir: Path) -> None:
    series = read_log(logdir).history["loss/value"]
    figures = Parsed(html_page(one(logdir))).data["figures"]
    line = next(t for f in figures.values() for t in f["data"] if t.get("name") == "training loss")
    assert line["x"] == series.steps.tolist()
    np.testing.assert_allclose(line["y"], series.values[:, 0], rtol=1e-6)


def test_nothing_is_fetched(logdir: Path) -> None:
    page = html_page(one(logdir))
    parsed = Parsed(page)
    assert "default-src 'none'" in page
    assert all(link.startswith("#") for link in parsed.links), parsed.links
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(parsed.tags)
    own = page.replace(rendered_plotly(), "")
    assert not re.search(r"(?:https?:)?//(?!\s)[\w.-]+\.\w+/", own), "an address outside of plotly's own script"


def rendered_plotly() -> str:
    from traindiag.panels.report.page import plotly_script

    return plotly_script()


def test_names_and_messages_are_text(tmp_path: Path) -> None:
    report = Report((reported(HOSTILE, hostile(), HOSTILE, (HOSTILE,)),), HOSTILE, HOSTILE, HOSTILE)
    page = html_page(report)
    parsed = Parsed(page)
    assert not parsed.handlers
    assert not {"img", "b"} & (set(parsed.tags) - {"b"}), "markup came in"
    assert parsed.tags.count("b") == 1  # the title of the bar, ours
    assert parsed.tags.count("script") == 4  # figures, colours, plotly, the page's own
    assert HOSTILE in parsed.text
    text = markdown_report(report)
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"(?<!\\)\]\((?!\))", text), "a link came in"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == row.count("|") - len(re.findall(r"\\\|", row)) for row in rows)


def test_a_browser_draws_it_and_runs_nothing_of_a_name(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html_page(Report((reported(HOSTILE, hostile()),))), "utf-8")
    for theme in ("light", "dark"):
        shown = dom(page, tmp_path / theme, f"?all&theme={theme}")
        assert f'data-theme="{theme}"' in shown
        drawn = shown.count('class="main-svg"')
        assert drawn >= 2 * len(Parsed(page.read_text("utf-8")).data["figures"]), "a figure is missing"
        assert "CONSOLE" not in shown, shown[shown.index("CONSOLE") - 200 :][:800]
        assert (
            "<img" not in shown
            and "javascript:" not in re.sub(r"<script.*?</script>", "", shown, flags=re.S)[:0] + ""
        )


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_log(tmp_path / name, range(120), run=RunInfo(run_id=name, length=120))
    page = Parsed(html_page(one(tmp_path)))
    assert page.tags.count("header") == 2 and "2 runs" in page.text
    names = [t["name"] for f in page.data["figures"].values() for t in f["data"] if "name" in t]
    assert names.count("a") == names.count("b") >= 2  # loss and logits of both in one chart each
    text = markdown_report(one(tmp_path))
    assert "## a" in text and "## b" in text and "| a | nothing found |" in text


def test_many_runs_become_a_table(tmp_path: Path) -> None:
    for i in range(5):
        write_log(tmp_path / str(i), range(40), run=RunInfo(run_id=str(i), length=40))
    page = Parsed(html_page(one(tmp_path)))
    assert "Charts show the first 4 of 5 runs" in page.text


@pytest.mark.parametrize("kept", [0.99, 0.5])
def test_a_truncated_log_is_read_as_far_as_it_goes(logdir: Path, tmp_path: Path, kept: float) -> None:
    (file,) = logdir.glob("events*")
    data = file.read_bytes()
    (tmp_path / file.name).write_bytes(data[: int(len(data) * kept)])
    report = one(tmp_path)
    words = Parsed(html_page(report)).text
    assert "incomplete: the run is being written or was killed" in words
    assert "incomplete" in markdown_report(report)
    assert 0 < len(report.runs[0].log.history["loss/value"]) <= 400


def test_a_corrupt_log_is_read_around_the_damage(logdir: Path, tmp_path: Path) -> None:
    (file,) = logdir.glob("events*")
    data = bytearray(file.read_bytes())
    at = data.index(b"traindiag/loss/value", len(data) // 2)
    data[at : at + 300] = b"\xff" * 300
    (tmp_path / file.name).write_bytes(data)
    report = one(tmp_path)
    assert "damaged" in Parsed(html_page(report)).text
    steps = report.runs[0].log.history["loss/value"].steps
    assert steps[0] == 0 and steps[-1] == 399 and len(steps) < 400


def test_a_resumed_run_is_one_and_shows_what_was_repeated(tmp_path: Path) -> None:
    write_log(tmp_path / "first", range(120), run=RunInfo(run_id="r"))
    write_log(tmp_path / "second", range(80, 200), segment=1, run=RunInfo(run_id="r"), loss=lambda s: 1.5)
    report = one(tmp_path)
    (run,) = report.runs
    assert run.log.history["loss/value"].steps.tolist() == list(range(200))
    (again,) = run.log.repeated
    assert again["loss/value"].steps.tolist() == list(range(80, 120))
    figures = Parsed(html_page(report)).data["figures"]
    grey = [t for f in figures.values() for t in f["data"] if t.get("name") == "gone through again"]
    assert grey[0]["x"] == list(range(80, 120))
    assert "2 jobs" in Parsed(html_page(report)).text


def test_somebody_elses_log_is_judged_first(tmp_path: Path) -> None:
    rows = ["step,train_loss,grad_norm"] + [f"{i},{2.0},{0.25 if i < 60 else 40.0}" for i in range(80)]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    run = read(tmp_path / "metrics.csv").only
    assert run.alerts and run["gradient/norm"].steps.tolist() == list(range(80))
    assert "not traindiag's own" in Parsed(html_page(one(tmp_path / "metrics.csv"))).text


# -- what must not be told ----------------------------------------------------------------------------------


def secret(tmp_path: Path) -> Report:
    folder = tmp_path / "ada-lovelace" / "secret-project"
    info = RunInfo(
        run_id="id-1234", model="Secret", length=40, seed=4711, silenced={"loss/spike": "asked by ada@host.example"},
        optimizers=(OptimizerInfo("AdamW", "AdamW", {"lr": 0.0314, "eps": 1e-8}, peak_lr=0.0314),),
    )  # fmt: skip
    told = alert(
        20,
        evidence=f"saved to {folder}/last.ckpt; see https://host.example/x; rank 3 of gpu-node-17",
        where="blocks.0",
    )
    file = write_log(folder, range(40), run=info, alerts=[told], host="")
    file.rename(file.with_name("events.out.tfevents.1795864719.gpu-node-17.6664.0"))
    with (folder / "events.out.tfevents.1795864719.gpu-node-17.6664.0").open("ab") as log:
        log.write(b"\x05\0\0\0\0\0\0\0torn by gpu-node-17")
    return make_report(tmp_path)


@pytest.mark.parametrize("form", ["html", "md"])
def test_redacted_reports_tell_no_host_path_or_person(tmp_path: Path, form: str) -> None:
    report = secret(tmp_path)
    words = ("ada", "secret-project", "gpu-node-17", str(tmp_path), "id-1234", "host.example")
    open_text = rendered(report, form).replace(rendered_plotly(), "")
    told = [w for w in words if w in open_text or w.replace("_", r"\_") in open_text]
    assert len(told) >= 5, "the test shows nothing"
    hidden = rendered(redacted(report), form).replace(rendered_plotly(), "")
    for word in words:
        assert not re.search(rf"\b{re.escape(word)}", hidden), word
    assert "Secret" in hidden and "0.0314" in hidden and "4711" in hidden
    assert "hosts, paths and user names" in hidden and "blocks.0" in hidden


def test_chosen_settings_are_left_out(tmp_path: Path) -> None:
    report = redacted(secret(tmp_path), ["lr", "seed", "model"])
    for form in ("html", "md"):
        page = rendered(report, form).replace(rendered_plotly(), "")
        assert not re.search(r"0\.0314|4711|Secret|Lower the rate", page)
        assert "lr, seed, model" in page
    assert "weight" not in str(report.hidden)
    with pytest.raises(ValueError, match=r"no field 'sead'.*Did you mean 'seed'"):
        redacted(report, ["sead"])


# -- the command, and the end of a run ----------------------------------------------------------------------


def test_the_command_writes_a_file(logdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(logdir)])
    assert done.exit_code == 0 and "report.html: 1 run" in done.output
    assert "Attention logits are too large" in (tmp_path / "report.html").read_text("utf-8")
    done = runner.invoke(app, ["report", str(logdir), "--format", "md", "--redact", "--title", "Incident 7"])
    assert done.exit_code == 0 and done.output.startswith("# Incident 7") and str(logdir) not in done.output
    done = runner.invoke(app, ["report", str(logdir), "--format", "md", "-o", "note.md", "--redact-fields", "seed"])
    assert done.exit_code == 0 and "seed" in (tmp_path / "note.md").read_text("utf-8")
    assert runner.invoke(app, ["report", str(logdir), "--redact-fields", "sead"]).exit_code == 2
    assert runner.invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 3


def test_without_plotly_it_says_what_to_install(
    logdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    done = CliRunner().invoke(app, ["report", str(logdir)])
    assert done.exit_code == 1 and 'pip install "traindiag[report]"' in done.output
    assert CliRunner().invoke(app, ["report", str(logdir), "--format", "md"]).exit_code == 0
    with pytest.raises(ModuleNotFoundError, match=r'pip install "traindiag\[report\]"'):
        read(logdir).only.plot()


def test_a_million_values_are_read_in_time(tmp_path: Path) -> None:
    """5,000 steps of 200 cells; no more than five seconds of this process."""
    from tests.panels.logs import Event, EventFileWriter, LogEncoder
    from traindiag.record.catalogue import BY_NAME

    info = RunInfo(run_id="r")
    cells = Cells(("optimizer", "parameter"), tuple(("AdamW", f"blocks.{i}.weight") for i in range(200)))
    encoder, writer = LogEncoder("r"), EventFileWriter(str(tmp_path), max_queue_size=10_000)
    writer.add_event(Event(summary=encoder.run(info, 0), step=0, wall_time=0.0))
    signal = BY_NAME["gradient/parameter_norm"]
    for step in range(5000):
        values = np.full(200, 1 + step % 7, np.float32)
        reading = Reading(signal, cells, values, np.ones(200, np.bool_))
        for at, summary in encoder.frame(Frame(step, "fast", {signal.name: reading}, info)):
            writer.add_event(Event(summary=summary, step=at, wall_time=0.0))
    for at, summary in encoder.flush():
        writer.add_event(Event(summary=summary, step=at, wall_time=0.0))
    writer.close()
    began = time.process_time()
    report = make_report(tmp_path)
    page = html_page(report)
    assert time.process_time() - began < 5.0
    assert report.runs[0].log.history[signal.name].values.size == 1_000_000 and len(page) < 8_000_000


def test_the_report_of_a_run_lies_beside_its_alerts(tmp_path: Path) -> None:
    write_log(tmp_path / "version_0", range(40), run=RunInfo(run_id="mine"))
    write_log(tmp_path / "version_1", range(40), run=RunInfo(run_id="other"))
    file = write_report(tmp_path / "version_0" / "traindiag", "mine")
    assert file == tmp_path / "version_0" / "traindiag" / "report.html"
    assert "version_0" in Parsed(file.read_text("utf-8")).text
    with pytest.raises(ValueError, match="no run 'other'"):
        write_report(tmp_path / "version_0" / "traindiag", "other")


def test_a_run_of_wandb_gets_it_as_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("page")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert not hand_to_wandb(file, "r1")
    assert "wandb" not in sys.modules
    logged: list[Any] = []

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type, self.files = name, type, {}

        def add_file(self, path: str, name: str) -> None:
            self.files[name] = Path(path).read_text()

    fake = types.SimpleNamespace(run=types.SimpleNamespace(log_artifact=logged.append), Artifact=Artifact)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert hand_to_wandb(file, "r1")
    (artifact,) = logged
    assert (artifact.name, artifact.type, artifact.files) == (
        "traindiag-report-r1",
        "report",
        {"report.html": "page"},
    )


def test_every_colour_has_its_own_in_the_dark() -> None:
    light = PALETTES["light"]
    singles = [light.text, light.faint, light.grid, light.empty, light.surface, light.info, light.warning]
    singles += [light.critical, light.healthy, light.nonfinite, *light.series]
    assert len(set(singles)) == len(singles), "two meanings of one colour cannot be told apart when it is replaced"
    swapped = dark_colours()
    assert set(singles) <= set(swapped)
    stops = {colour for scale in SCALES.values() for _, colour in scale}
    assert not stops & set(swapped), "a colour of a scale would change with the theme"


def test_the_headline_is_the_worst_and_the_first_warning_what_was_said_then(tmp_path: Path) -> None:
    told = [
        alert(20, id="a", title="A note that becomes worse", severity="info"),
        alert(30, id="a", title="Worse", status="escalated"),
        alert(40, id="b", title="The worst of all", severity="critical", rule="other"),
    ]
    write_log(tmp_path, range(60), alerts=told)
    text = markdown_report(one(tmp_path))
    assert "**critical**: The worst of all." in text
    assert "| First warning | step 30 | Worse |" in text
