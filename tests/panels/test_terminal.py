"""The terminal reads well with and without colours, and progress bars stay whole."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from traindiag.alerts.alert import Alert, Remedy
from traindiag.panels.layout import links
from traindiag.panels.terminal import TerminalPanel
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Reading
from traindiag.record.series import History

ALERT = Alert(
    "a", "opened", "max logit", "r1", 0, 120, 5.0, 2, "warning", "slow", "attention", "attention/max_logit",
    "blocks.0 head 3", 812.0, 1e4, "forecast", (250, 340, 520), (900, 1200, 1800), title="Attention logits grow",
    evidence="From 12 to 812 in 120 steps. " * 4, remedies=(Remedy("Lower it", source="a [b] c"),),
)  # fmt: skip
TABLE = [
    Coverage("attention", "exact", ("b0", "b1")),
    Coverage("attention", "unseen", ("b2",), "flex attention"),
    Coverage("output", "unseen", ("head",), "fused loss"),
    Coverage("loss", "exact", ("adam",)),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def history(norm=24.4):
    history = History()
    cells = Cells.along("optimizer", ["adam"])
    for step, value in ((0, 1.0), (233, norm), (399, 2.0)):
        history.add(step, Reading(BY_NAME["gradient/norm"], cells, np.float32([value]), np.ones(1, bool)))
    return history


def everything(stream):
    panel = TerminalPanel(stream)
    panel.start(TABLE, links("runs/a", "runs/a/v"))
    panel.alerts([ALERT])
    panel.summary(history(), [ALERT], 400, 0.0081)
    return stream.getvalue()


def test_plain_text_has_no_escapes_and_an_unbroken_link():
    text = everything(io.StringIO())
    assert "\x1b" not in text
    assert set(links("runs/a", "runs/a/v")[1:]) <= {line.strip() for line in text.splitlines()}
    assert all(len(line) <= 100 for line in text.splitlines() if "http" not in line)
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "WARNING" in text
    assert "a [b] c" in text  # brackets are no markup


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_colours_and_its_own_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = everything(Terminal())
    assert "\x1b[1;33mWARNING" in text
    bare = re.sub(r"\x1b\[[\d;]*m|\x1b\]8;[^\x1b]*\x1b\\", "", text)
    assert width - 25 < max(map(len, bare.splitlines())) <= width
    assert bare.count("http://localhost:6006/#timeseries") == 1
    assert bare.count("http://localhost:6006/#traindiag") == 1
    assert all(link in text for link in links("runs/a", "runs/a/v"))  # behind the visible ones


def test_colours_can_be_refused(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "33m" not in everything(Terminal())


def test_what_is_not_seen_is_told_with_its_reason():
    text = everything(io.StringIO())
    assert "watches attention (2 of 3), loss\n" in text
    assert "not seen   attention of b2: flex attention" in text
    assert "not seen   output of head: fused loss" in text


def test_the_summary_counts_events_once_at_their_last_severity():
    stream = io.StringIO()
    told = [
        ALERT,
        Alert.from_dict({**ALERT.to_dict(), "status": "escalated", "severity": "critical"}),
        Alert.from_dict({**ALERT.to_dict(), "id": "b"}),
        Alert.from_dict({**ALERT.to_dict(), "id": "b", "status": "closed"}),
    ]
    TerminalPanel(stream).summary(history(), told, 1400, 0.0081)
    head, _, row = stream.getvalue().strip().splitlines()
    assert head == "traindiag  1,400 steps: 1 critical alert, 1 warning; cost 0.8% of the step time"
    assert row.split() == ["gradient/norm", "24.4", "233", "2", "adam"]


def test_a_run_without_findings_says_so():
    stream = io.StringIO()
    TerminalPanel(stream).summary(History(), [], 10)
    assert stream.getvalue() == "traindiag  10 steps: no alerts\n"


def test_a_nan_is_the_worst_number_of_a_run():
    stream = io.StringIO()
    TerminalPanel(stream).summary(history(float("nan")), [], 400)
    assert re.search(r"gradient/norm +nan +233 +2 +adam", stream.getvalue())


def test_a_closed_event_takes_one_line():
    stream = io.StringIO()
    TerminalPanel(stream).alerts([Alert.from_dict({**ALERT.to_dict(), "status": "closed"})])
    assert stream.getvalue() == "CLOSED  Attention logits grow (step 120)\n"


def test_a_bar_of_tqdm_is_cleared_before_and_drawn_after(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=10, file=sys.stdout, desc="Epoch 0") as bar:
        bar.update(5)
        TerminalPanel().alerts([ALERT])
    shown = stream.getvalue()
    before, after = shown[: shown.index("WARNING")], shown[shown.index("Lower it") :]
    assert re.search(r"Epoch 0[^\n]*\r +\r[^\n\w]*\n", before)  # wiped; nothing of the bar stands on our line
    assert "\n\rEpoch 0" in after or "\nEpoch 0" in after.replace("\r", "")


def test_a_bar_of_rich_stays_below(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(file=stream, force_terminal=True, width=100)
    with Progress(console=console, auto_refresh=False) as bar:
        task = bar.add_task("Epoch 0", total=10)
        bar.update(task, completed=5, refresh=True)
        TerminalPanel().alerts([ALERT])
        shown = stream.getvalue()
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).split("\n")
    (at,) = (i for i, line in enumerate(lines) if "WARNING" in line)
    assert "Epoch 0" not in lines[at]
    assert any("Epoch 0" in line for line in lines[at + 1 :])  # drawn again beneath


def test_a_cause_is_explained_once_and_a_note_is_one_line() -> None:
    stream = io.StringIO()
    panel = TerminalPanel(stream)
    later = {**ALERT.to_dict(), "id": "other", "rule": "another", "step": ALERT.step + 30}
    panel.alerts([ALERT, Alert.from_dict(later)])
    text = stream.getvalue()
    assert text.count(ALERT.remedies[0].text[:20]) == 1
    assert f"as told at step {ALERT.step}" in text
    note = io.StringIO()
    TerminalPanel(note).alerts([Alert.from_dict({**ALERT.to_dict(), "severity": "info"})])
    assert len(note.getvalue().strip().splitlines()) == 1
    assert note.getvalue().startswith("INFO")


def test_the_summary_tells_how_spiky_a_long_run_was():
    told, runs = [], (100, 300)
    for steps in runs:
        curve = History()
        for step in range(steps):
            curve.add(step, Reading.scalar(BY_NAME["loss/value"], 2.0 + 0.1 * (step % 2) + 9.0 * (step == 200)))
        stream = io.StringIO()
        TerminalPanel(stream).summary(curve, [], steps)
        told.append(stream.getvalue())
    assert "spike score" not in told[0]
    assert f"spike score (share of steps 7 sigma away): loss {1 / (300 - 128):.2%}" in told[1]
