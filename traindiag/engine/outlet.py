"""Where a run's numbers and alerts go: panels, alert file, terminal, other loggers, the user's actions."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from traindiag.alerts.actions import Decision
from traindiag.alerts.alert import Alert
from traindiag.alerts.jsonl import AlertFile
from traindiag.alerts.webhook import Webhook
from traindiag.engine.judge import BATCH
from traindiag.engine.settings import Settings
from traindiag.panels.layout import links
from traindiag.panels.sinks import FileSink, SummarySink
from traindiag.panels.tensorboard import TensorBoardPanels
from traindiag.panels.terminal import TerminalPanel
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame
from traindiag.record.run_info import RunInfo
from traindiag.record.series import Series
from traindiag.transfer.ranks import rank

AggregateLogger = Callable[[Mapping[str, float], int], None]


class Outlet:
    """Tells what was found. Nothing here can stop a run: what fails is reported once and left out.

    Only the first rank writes, prints and posts. Functions run on every rank, with the same alerts in the same order.
    What all ranks must do after the same step is left to :class:`~traindiag.engine.decisions.Decisions`.

    Args:
        settings: What the user asked for.
        sink: Where event-file summaries go; None for no panels.
        folder: Where ``alerts.jsonl`` goes, and what trainers save for alerts; None for no file.
        show: Folder to give to ``tensorboard --logdir``.
        loggers: Functions that take aggregates and their step, for loggers other than TensorBoard's.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        sink: SummarySink | None = None,
        folder: str | os.PathLike[str] | None = None,
        show: str | os.PathLike[str] | None = None,
        loggers: Sequence[AggregateLogger] = (),
    ) -> None:
        speaks = rank() == 0
        self._actions: list[Callable[[Alert], None]] = [
            action
            for action in settings.actions
            if not isinstance(action, Decision) and (speaks or getattr(action, "everywhere", True))
        ]
        self._silenced = settings.silence
        self.folder = None if folder is None else Path(folder)
        self._layout, self._families = settings.layout, {m.family for m in settings.monitors}
        self._report = settings.report and speaks
        self._run = ""
        self._sink = sink if speaks else None
        self._show = show
        self._terminal = TerminalPanel() if settings.terminal and speaks else None
        self._file = None
        if folder is not None and speaks:
            self._file = AlertFile(Path(folder) / "alerts.jsonl", on_fault=self._no_file)
        self._loggers = list(loggers) if speaks else []
        self._panels: TensorBoardPanels | None = None
        self._unwritten: list[Frame] = []
        self._due = False
        self._points: list[tuple[int, Mapping[str, float]]] = []

    @classmethod
    def to_directory(cls, folder: str | os.PathLike[str] | None, settings: Settings) -> Outlet:
        """Panels and alerts in a folder of our own; in memory only for None."""
        if folder is None:
            return cls(settings)
        return cls(settings, sink=FileSink(folder), folder=Path(folder) / "traindiag", show=folder)

    def start(self, run: RunInfo, segment: int, step: int) -> None:
        """A job begins with ``step``."""
        self._run = run.run_id
        if self._panels is None and self._sink is not None:
            self._panels = TensorBoardPanels(
                self._sink, run.run_id, segment, layout=self._layout, families=self._families, on_problem=self.say
            )
            self._panels.start(run, step)

    def coverage(self, run: RunInfo, coverage: Sequence[Coverage], step: int) -> None:
        """The first sample has shown what is seen and what is not."""
        if self._panels is not None:
            self._panels.start(run, step)
            self._panels.coverage(coverage, step)
        if self._terminal is not None:
            where = self._sink.directory if self._sink is not None else None
            self._terminal.start(coverage, links(self._show, where) if self._show else ())

    def frame(self, frame: Frame, alerts: Sequence[Alert]) -> None:
        """Takes one frame to be written and tells what it brought up."""
        if self._panels is not None:
            if len(self._unwritten) >= 2 * BATCH:  # nobody does it beside a training step
                self._write()
            self._unwritten.append(frame)
            self._due = self._due or frame.lane != "fast" or len(self._unwritten) >= BATCH
            if alerts:
                self._write()
                self._panels.alerts(alerts, frame.step)
        self._log()
        for hook in self._webhooks():
            for problem in hook.problems():
                self.say(problem)
        if not alerts:
            return
        if self._file is not None:
            self._file.write(alerts)
        if self._terminal is not None:
            self._terminal.alerts(a for a in alerts if a.severity != "info" or a.status == "opened")
        for alert in alerts:
            for action in list(self._actions):
                try:
                    action(alert)
                except Exception as error:
                    self._actions.remove(action)
                    self.say(f"action {action!r} failed and is not called again: {type(error).__name__}: {error}")

    def say(self, text: str) -> None:
        """One line about diagnostics themselves; a warning where nothing is printed."""
        if self._terminal is not None:
            self._terminal.note(text)
        else:
            warnings.warn(f"traindiag: {text}", RuntimeWarning, stacklevel=3)

    def _no_file(self, error: OSError) -> None:
        self.say(f"alerts are not written to a file: {type(error).__name__}: {error}; training goes on")

    def finish(self, history: Mapping[str, Series], alerts: Sequence[Alert], steps: int, overhead: float) -> None:
        """The job is over."""
        if self._panels is not None:
            self._write()
            self._points.append((steps, self._panels.close()))
            self._log()
            self._panels = None
            if self._report and steps:
                self._write_report()
        for hook in self._webhooks():
            for problem in hook.finish():
                self.say(problem)
        if self._terminal is not None and steps:
            cost = overhead if overhead == overhead else None
            self._terminal.summary(history, alerts, steps, cost, self._silenced)

    def _write_report(self) -> None:
        """Nothing that goes wrong here is worth a run that has ended well."""
        from traindiag.panels.report.at_the_end import hand_to_wandb, write_report

        if self.folder is None:
            return
        try:
            file = write_report(self.folder, self._run)
            handed = hand_to_wandb(file, self._run)
        except Exception as error:
            self.say(f"the report could not be made: {type(error).__name__}: {error}")
        else:
            self.say(f"the report is {file}" + (", and an artifact of the W&B run" if handed else ""))

    def _webhooks(self) -> list[Webhook]:
        return [action for action in self._actions if isinstance(action, Webhook)]

    def write_due(self) -> None:
        """Writes frames that have waited long enough. In any thread, while no other method runs."""
        if self._due:
            self._write()

    def _write(self) -> None:
        frames, self._unwritten, self._due = self._unwritten, [], False
        if self._panels is not None:
            self._points += [(frame.step, self._panels.frame(frame)) for frame in frames]

    def _log(self) -> None:
        """Hands on the aggregates, in the training thread: other loggers know no other."""
        points, self._points = self._points, []
        for step, values in points:
            for logger in list(self._loggers if values else ()):
                try:
                    logger(values, step)
                except Exception as error:
                    self._loggers.remove(logger)
                    self.say(f"a logger refused the aggregates and gets no more: {type(error).__name__}: {error}")
