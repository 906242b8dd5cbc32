"""A report of a log: what happened, what it was told by, and what the loss alone would have told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import traindiag
from traindiag.panels.report.markdown import markdown_report
from traindiag.panels.report.page import html_page
from traindiag.panels.report.story import LossShown, Report, ReportedRun
from traindiag.playback.foreign import Unreadable, has_event_files
from traindiag.playback.loss_shown import loss_story
from traindiag.playback.replay import ReplayedRun, replay
from traindiag.record.log import LogData, read_logs


def make_report(logdir: str | os.PathLike[str], *, title: str = "Training diagnostics") -> Report:
    """Reads every run at or under ``logdir``.

    Logs of ours are shown as their runs were told; other people's are judged by the default rules first.

    Raises:
        traindiag.playback.foreign.Unreadable: If there is no log that can be read.
    """
    path = Path(logdir)
    if not path.exists():
        raise Unreadable(f"there is no log at {path}")
    logs = read_logs(path) if has_event_files(path) else []
    if logs:
        names = _names(logs, path)
        runs = [_run(name, log, str(log.files[-1].parent)) for name, log in zip(names, logs)]
    else:
        runs = [_judged(run) for run in replay(path).runs]
    made = datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC")
    return Report(tuple(runs), title, made, traindiag.__version__)


def rendered(report: Report, form: str = "html") -> str:
    """The report as a page (``html``) or as Markdown (``md``).

    Raises:
        ModuleNotFoundError: If it is to be a page and plotly is not installed.
        ValueError: If there is no such form.
    """
    if form == "html":
        return html_page(report)
    if form == "md":
        return markdown_report(report)
    raise ValueError(f"a report is written as 'html' or 'md', got {form!r}")


def _run(name: str, log: LogData, source: str, notes: Sequence[str] = ()) -> ReportedRun:
    return ReportedRun(name, log, source, _loss(log), tuple(notes))


def _judged(run: ReplayedRun) -> ReportedRun:
    alerts = tuple(alert.to_dict() for alert in run.alerts)
    log = LogData(run.run, run.history, alerts, (), (0,), (Path(run.source),), ())
    notes = [*run.notes, "this log is not traindiag's own: its numbers were judged by their names, after the run"]
    return _run(run.run.run_id or Path(run.source).name, log, run.source, notes)


def _loss(log: LogData) -> LossShown | None:
    story = loss_story(log.history.get("loss/value"))
    if story is None:
        return None
    shown = story.shown
    how = "became NaN or infinite" if shown is not None and shown == story.nonfinite else "rose and stayed"
    early = [s for s in story.six_sigma if shown is None or s < shown]
    first = story.six_sigma[0] if story.six_sigma else None
    return LossShown(story.steps, shown, how, first, len(story.six_sigma), len(early) if shown is not None else 0)


def _names(logs: Sequence[LogData], root: Path) -> list[str]:
    """Folders by their way from the root, where they tell the runs apart; otherwise with the run's id."""
    folders = [log.files[-1].parent for log in logs]
    own = [_below(folder, root) for folder in folders]
    return [name if own.count(name) == 1 else f"{name} ({log.run.run_id})" for name, log in zip(own, logs)]


def _below(folder: Path, root: Path) -> str:
    base = root if root.is_dir() else root.parent
    name = folder.relative_to(base).as_posix() if folder != base else folder.resolve().name
    return name.removesuffix("/traindiag")
