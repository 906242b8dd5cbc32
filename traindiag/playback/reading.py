"""What a notebook gets of a log: its runs, with arrays by signal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from traindiag.alerts.alert import Alert
from traindiag.panels.figures.events import events_of
from traindiag.panels.notebook import plot
from traindiag.playback.foreign import Unreadable, has_event_files
from traindiag.playback.replay import ReplayedRun, replay
from traindiag.record.catalogue import near
from traindiag.record.coverage import Coverage
from traindiag.record.log import LogData, read_logs
from traindiag.record.run_info import RunInfo
from traindiag.record.series import Series

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class ReadRun(Mapping[str, Series]):
    """One run of a log: a mapping from signals to their :class:`~traindiag.record.series.Series`.

    Args:
        name: Its folder, as far as it tells runs apart.
        log: Everything that was recorded.
        source: Where it was found.
        notes: What could not be read, or has to be known of the numbers, in words.
    """

    name: str
    log: LogData
    source: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, signal: str) -> Series:
        return self.log.history[signal]

    def __iter__(self) -> Iterator[str]:
        return iter(self.log.history)

    def __len__(self) -> int:
        return len(self.log.history)

    def __repr__(self) -> str:
        return f"ReadRun({self.name!r}, {len(self)} signals, {len(self.alerts)} alerts)"

    @property
    def run(self) -> RunInfo:
        """What was trained."""
        return self.log.run

    @property
    def alerts(self) -> list[Alert]:
        """Every message, oldest first."""
        events, _ = events_of(self.log.alerts)
        return sorted((a for e in events for a in e.messages), key=lambda a: (a.step, a.time))

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What was seen and what was not."""
        return self.log.coverage

    def plot(self, what: str = "timeline", *, theme: str = "light", **options: str) -> Figure:
        """A figure of the report, such as ``timeline`` or ``heads-over-time``, or a signal by its name.

        Raises:
            ModuleNotFoundError: With what to install, if plotly is missing.
            ValueError: If there is neither such a figure nor such a signal.
        """
        return plot(self.log, what, name=self.name, theme=theme, **options)


class Runs(Mapping[str, ReadRun]):
    """The runs of a log by their names, in the order they began."""

    def __init__(self, runs: Sequence[ReadRun]) -> None:
        self._runs = {run.name: run for run in runs}

    def __getitem__(self, name: str) -> ReadRun:
        if name not in self._runs:
            raise KeyError(f"there is no run {name!r}.{near(name, self._runs)} There are {list(self)}")
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        return f"Runs({list(self._runs.values())})"

    @property
    def only(self) -> ReadRun:
        """The run, where there is one.

        Raises:
            ValueError: If there are several.
        """
        if len(self) != 1:
            raise ValueError(f"there are {len(self)} runs; choose one of {list(self)}")
        return next(iter(self.values()))


def read(logdir: str | os.PathLike[str]) -> Runs:
    """Reads every run of a log: ours, or one that ``replay`` takes (TensorBoard scalars, CSV, JSONL, trainer state).

    A damaged or unfinished file is read as far as it goes; ``notes`` and ``log.problems`` say so.

    Args:
        logdir: A file, or a folder that is searched with everything below it.

    Raises:
        traindiag.playback.foreign.Unreadable: If there is no log that can be read; a ``ValueError``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "metrics.csv"
        ...     _ = file.write_text("step,train_loss" + chr(10) + "0,2.5" + chr(10) + "1,2.25")
        ...     run = read(file).only
        >>> run["loss/value"].values[:, 0].tolist()
        [2.5, 2.25]
    """
    path = Path(logdir)
    if not path.exists():
        raise Unreadable(f"there is no log at {path}")
    logs = read_logs(path) if has_event_files(path) else []
    if not logs:
        return Runs([_judged(run) for run in replay(path).runs])
    return Runs([ReadRun(n, log, str(log.files[-1].parent)) for n, log in zip(_names(logs, path), logs)])


def _judged(run: ReplayedRun) -> ReadRun:
    alerts = tuple(alert.to_dict() for alert in run.alerts)
    log = LogData(run.run, run.history, alerts, (), (0,), (Path(run.source),), ())
    own = "this log is not traindiag's own: its numbers were judged by their names, after the run"
    return ReadRun(run.run.run_id or Path(run.source).name, log, run.source, (*run.notes, own))


def _names(logs: Sequence[LogData], root: Path) -> list[str]:
    """Folders by their way from the root, where they tell the runs apart; otherwise with the run's id."""
    own = [_below(log.files[-1].parent, root) for log in logs]
    return [name if own.count(name) == 1 else f"{name} ({log.run.run_id})" for name, log in zip(own, logs)]


def _below(folder: Path, root: Path) -> str:
    base = root if root.is_dir() else root.parent
    name = folder.relative_to(base).as_posix() if folder != base else folder.resolve().name
    return name.removesuffix("/traindiag")
