"""Where summaries go: into the event file of a logger that is there, or into one of our own."""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class SummarySink(Protocol):
    """Takes summaries in the order of their steps."""

    @property
    def directory(self) -> str | None:
        """Where its event file lies, None where that is not known."""

    def add_summary(self, summary: Summary, step: int, at: float | None) -> None:
        """Queues one event; ``at`` is its time in seconds since the epoch, None for now."""

    def flush(self) -> None:
        """Brings what is queued to the disk."""

    def close(self) -> None:
        """No more will come."""


class WriterSink:
    """Writes through the ``SummaryWriter`` of torch or tensorboardX that the loop's own logger uses.

    TensorBoard reads only the newest event file of a folder reliably, so a second one beside it is never opened.

    Args:
        writer: A ``SummaryWriter``. It is flushed and never closed here.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @property
    def directory(self) -> str | None:
        # torch's SummaryWriter has the one, tensorboardX's the other
        found = getattr(self.writer, "log_dir", None) or getattr(self.writer, "logdir", None)
        return None if found is None else os.fspath(found)

    def add_summary(self, summary: Summary, step: int, at: float | None) -> None:
        # A closed SummaryWriter would open a new file; what comes after its end is not written.
        if getattr(self.writer, "file_writer", self) is None:
            raise RuntimeError("the logger closed its SummaryWriter")
        file_writer = self.writer._get_file_writer()
        if type(file_writer).__module__.partition(".")[0] == "tensorboardX":  # it takes no messages but its own
            from tensorboardX.proto.summary_pb2 import Summary as TheirSummary

            summary = TheirSummary.FromString(summary.SerializeToString())
        file_writer.add_summary(summary, step, at)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.flush()


class FileSink:
    """An event file of our own, opened at the first write.

    Args:
        directory: Made if need be. No other writer may use it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self._writer: EventFileWriter | None = None

    def add_summary(self, summary: Summary, step: int, at: float | None) -> None:
        if self._writer is None:
            # The default queue of ten events makes the trainer wait for the disk.
            self._writer = EventFileWriter(self.directory, max_queue_size=1000, flush_secs=30)
        self._writer.add_event(Event(summary=summary, step=step, wall_time=time.time() if at is None else at))

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None  # a run that goes on after an exception opens another file
        if writer is not None:
            writer.close()
