"""A report of a log: every run that is found there."""

from __future__ import annotations

import os
from datetime import datetime, timezone

from traindiag.panels.report.story import Report, reported
from traindiag.playback.reading import read


def make_report(logdir: str | os.PathLike[str], *, title: str = "Training diagnostics", version: str = "") -> Report:
    """Reads every run at or under ``logdir``.

    Logs of ours are shown as their runs were told; other people's are judged by the default rules first.

    Raises:
        traindiag.playback.foreign.Unreadable: If there is no log that can be read.
    """
    runs = tuple(reported(run.name, run.log, run.source, run.notes) for run in read(logdir).values())
    made = datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC")
    return Report(runs, title, made, version)
