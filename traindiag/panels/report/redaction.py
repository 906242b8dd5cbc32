"""A report that can be shown to others: without hosts, paths, user names and whatever else was asked for."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from traindiag.panels.report.story import Report, ReportedRun
from traindiag.record.catalogue import near
from traindiag.record.coverage import Coverage
from traindiag.record.log import LogData
from traindiag.record.run_info import RunInfo

PATH, ADDRESS, NAME = "[path]", "[address]", "[name]"

_PATHS = re.compile(
    r"""(?<![\w.\]])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/:;,'"<>|()]+[\\/])+[^\s\\/:;,'"<>|()]*"""
    r"""|\\\\[^\s'"<>|]+"""  # \\server\share
)
_ADDRESSES = re.compile(
    r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+|[\w.+-]+@[\w.-]+\w|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b", re.I
)
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d+\.(?P<host>.+?)(?:\.\d+\.\d+|\.\d+)?$")
_EVERYBODY = {"root", "user", "admin", "ubuntu", "runner", "home", "train", "model", "test", "worker", "localhost"}
"""Names that tell nobody, and are words of alerts besides."""


def redacted(report: Report, hidden: Sequence[str] = ()) -> Report:
    """Takes hosts, paths and user names out of everything that is shown, and the fields ``hidden``.

    Runs are numbered, since a folder's name may tell who trained what. Numbers and names of layers stay.

    Args:
        report: What is to be shown.
        hidden: More to leave out: fields of :class:`~traindiag.record.run_info.RunInfo`, such as ``model`` or
            ``seed``, or settings of an optimizer, such as ``lr``. Remedies that would set one of them are left out.

    Raises:
        ValueError: If there is no such field.
    """
    known = {f.name for f in fields(RunInfo)} | {"lr", "peak_lr"}
    known |= {key for run in report.runs for o in run.log.run.optimizers for key in o.settings}
    names = [name.removeprefix("optimizer.").strip() for name in hidden]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no field {name!r} to leave out.{near(name, known)} There are {sorted(known)}")
    words = _words(report.runs)
    runs = tuple(_run(run, f"run {i}", names, words) for i, run in enumerate(report.runs, 1))
    left_out = ("hosts, paths and user names", *names)
    return replace(report, runs=runs, hidden=left_out)


def _run(run: ReportedRun, name: str, hidden: Sequence[str], words: Sequence[str]) -> ReportedRun:
    log = run.log
    info = _settings(log.run, hidden)
    changed = LogData(
        run=RunInfo.from_dict(_cleaned({**info.to_dict(), "run_id": ""}, words)),
        history=log.history,
        alerts=tuple(_alert(alert, hidden, words) for alert in log.alerts),
        coverage=tuple(Coverage(c.family, c.sight, c.places, clean(c.reason, words)) for c in log.coverage),
        segments=log.segments,
        files=(),
        problems=tuple(clean(text, words) for text in log.problems),
        repeated=log.repeated,
    )
    return ReportedRun(name, changed, "", run.loss, tuple(clean(note, words) for note in run.notes))


def _settings(info: RunInfo, hidden: Sequence[str]) -> RunInfo:
    empty = RunInfo()
    own = {f.name for f in fields(RunInfo)}
    info = replace(info, **{name: getattr(empty, name) for name in hidden if name in own})
    rate = "lr" in hidden or "peak_lr" in hidden
    secret = {*hidden, *(("lr", "initial_lr") if rate else ())}
    optimizers = tuple(
        replace(
            o,
            settings={k: v for k, v in o.settings.items() if k not in secret},
            peak_lr=None if rate else o.peak_lr,
        )
        for o in info.optimizers
    )
    return replace(info, optimizers=optimizers)


def _alert(alert: Mapping[str, Any], hidden: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = _cleaned(dict(alert), words)
    found["run"] = ""
    if hidden and isinstance(found.get("remedies"), list):
        found["remedies"] = [r for r in found["remedies"] if not _sets(r, hidden)]
    return found


def _sets(remedy: Any, hidden: Sequence[str]) -> bool:
    change = remedy.get("change", {}) if isinstance(remedy, dict) else {}
    return any(key.split(".")[-1] in hidden or key in hidden for key in change)


def _cleaned(value: Any, words: Sequence[str]) -> Any:
    if isinstance(value, str):
        return clean(value, words)
    if isinstance(value, Mapping):
        return {key: _cleaned(v, words) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(v, words) for v in value]
    return value


def clean(text: str, words: Iterable[str] = ()) -> str:
    """Text without paths, addresses and the given names.

    Example:
        >>> clean("/home/ada/runs/a: damaged, told ada@host.example via https://host.example/x", ["ada"])
        '[path]: damaged, told [address] via [address]'
        >>> clean("attention/logit_range of ada is 3 / 4", ["ada"])
        'attention/logit_range of [name] is 3 / 4'
    """
    text = _PATHS.sub(PATH, _ADDRESSES.sub(ADDRESS, text))
    for word in words:
        text = re.sub(rf"(?<![\w]){re.escape(word)}(?![\w])", NAME, text)
    return text


def _words(runs: Sequence[ReportedRun]) -> list[str]:
    """Names of this user, of this host, and of the hosts in the names of event files."""
    found = {socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container without a user database
        found.add(getpass.getuser())
    for run in runs:
        for file in run.log.files:
            match = _EVENT_FILE.match(file.name)
            if match:
                found.add(match["host"])
    return sorted((w for w in found if len(w) > 2 and w.lower() not in _EVERYBODY), key=len, reverse=True)
