"""The alert file: appended, whole, never double, never in the way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from tests.alerts.test_text import ALERT
from traindiag.alerts.alert import Alert
from traindiag.alerts.jsonl import AlertFile, read_alerts


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "alerts.jsonl"
    file = AlertFile(path)
    assert not path.parent.exists()
    bad = replace(ALERT, id="2", value=math.nan, limit=math.inf, where="\u4e2d\n")
    file.write([ALERT, bad])
    assert read_alerts(path)[0] == ALERT
    assert [a.to_dict() for a in read_alerts(path)] == [ALERT.to_dict(), bad.to_dict()]
    assert all(json.loads(line) for line in path.read_text("utf-8").splitlines())


def test_a_resumed_run_doubles_nothing_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    worse = [replace(ALERT, status="escalated", severity=s) for s in ("warning", "critical")]
    AlertFile(path).write([ALERT, worse[0]])
    again = AlertFile(path)
    again.write([ALERT, *worse])
    again.write(worse)
    assert [(a.status, a.severity) for a in read_alerts(path)] == [
        ("opened", "warning"), ("escalated", "warning"), ("escalated", "critical"),
    ]  # fmt: skip


def test_a_line_cut_short_by_a_crash_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    AlertFile(path).write([ALERT])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-40])
    AlertFile(path).write([replace(ALERT, id="2")])
    assert [a.id for a in read_alerts(path)] == ["1f", "2"]
    # Cut within a character and by a newer schema: left out, not fatal.
    path.write_bytes(path.read_bytes() + b'{"id": "\xe4\n{"schema": 99}\n[]\n')
    assert [a.id for a in read_alerts(path)] == ["1f", "2"]


def test_a_disk_that_fails_is_reported_once_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told: list[OSError] = []
    file = AlertFile(tmp_path / "file" / "alerts.jsonl", on_fault=told.append)
    for i in range(3):
        file.write([replace(ALERT, id=str(i))])
    assert len(told) == 1
    (tmp_path / "file").unlink()
    late: Alert = replace(ALERT, id="late")
    file.write([late])
    assert read_alerts(file.path) == [late]
