"""Everything that a run shows in TensorBoard: aggregates, layout, alerts as text, and the log itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text import metadata as text_metadata

from traindiag.alerts.alert import Alert
from traindiag.panels.aggregates import Aggregates
from traindiag.panels.feed import alerts_markdown, coverage_markdown
from traindiag.panels.layout import layout_summary
from traindiag.panels.sinks import SummarySink
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame
from traindiag.record.log_format import LogEncoder
from traindiag.record.run_info import RunInfo

FEED = "diag_alerts/feed"
SEVERITY = "diag_alerts/severity"
COVERAGE = "diag_run/coverage"
_LEVELS = {"info": 0.0, "warning": 1.0, "critical": 2.0}


class TensorBoardPanels:
    """Writes one job of a run. Nothing it meets is raised into the training loop.

    Args:
        sink: Where summaries go.
        run_id: Identifier of the run.
        segment: Which job of the run this is.
        layout: Whether a custom-scalars layout is written; without it the loop's own stays.
        families: Families beside the usual ones that have charts in it.
        on_problem: Told once, in words, why writing stopped; then nothing more is written.
    """

    def __init__(
        self,
        sink: SummarySink,
        run_id: str,
        segment: int = 0,
        *,
        layout: bool = True,
        families: Collection[str] = (),
        on_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._sink = sink
        self._log = LogEncoder(run_id, segment)
        self._aggregates = Aggregates()
        self._layout, self._families = layout, families
        self._on_problem = on_problem
        self._works = True
        self._open: dict[str, float] = {}
        self._alert_step = -1

    def start(self, run: RunInfo, step: int) -> None:
        """Tells what is trained; once more when more is known of it.

        Args:
            run: Facts about the run.
            step: The first step of this job, or the step at which more is known.
        """
        summary = self._log.run(run, step)
        if self._layout:
            summary.MergeFrom(layout_summary(self._families))
            self._layout = False
        self._write([(step, summary)])

    def coverage(self, table: Sequence[Coverage], step: int) -> None:
        """Tells what is seen and what is not."""
        summary = self._log.coverage(table)
        summary.value.append(_text(COVERAGE, coverage_markdown(table)))
        self._write([(step, summary)])

    def frame(self, frame: Frame) -> dict[str, float]:
        """Writes what the frame makes due.

        Returns:
            The aggregates written, for loggers other than TensorBoard; often empty for a fast frame.
        """
        points = self._aggregates.update(frame)
        if frame.sampled and frame.step > self._alert_step:
            points[SEVERITY] = self._severity()
        due = self._log.frame(frame)
        self._write([*due, *_scalars(frame.step, points)], frame.time or None)
        return points

    def alerts(self, alerts: Sequence[Alert], step: int) -> None:
        """Writes the alerts of one step, and the samples that led to them."""
        if not alerts:
            return
        for alert in alerts:
            if alert.status == "closed":
                self._open.pop(alert.id, None)
            else:
                self._open[alert.id] = _LEVELS[alert.severity]
        # Of two summaries of one tag and step TensorBoard keeps one, and an older step deletes the newer ones.
        self._alert_step = step = max(step, self._alert_step + 1)
        summary = self._log.alerts([a.to_dict() for a in alerts])
        summary.value.append(_text(FEED, alerts_markdown(alerts)))
        summary.value.append(Summary.Value(tag=SEVERITY, simple_value=self._severity()))
        self._write([*self._log.flush(), (step, summary)], alerts[-1].time or None)
        self.flush()

    def flush(self) -> None:
        """Brings everything to the disk."""
        self._guard(self._sink.flush)

    def close(self) -> dict[str, float]:
        """Writes what is still held back.

        Returns:
            The last aggregates, as :meth:`frame` does.
        """
        step, points = self._aggregates.flush()
        self._write([*self._log.flush(), *_scalars(step, points)])
        self._guard(self._sink.close)
        return points

    def _severity(self) -> float:
        return max(self._open.values(), default=0.0)

    def _write(self, summaries: Sequence[tuple[int, Summary]], at: float | None = None) -> None:
        for step, summary in summaries:
            self._guard(partial(self._sink.add_summary, summary, step, at))

    def _guard(self, write: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            write()
        except Exception as error:  # a full disk, a closed logger: no reason to lose the run
            self._works = False
            self._on_problem(f"panels stopped: {type(error).__name__}: {error}; training goes on without them")


def _scalars(step: int, points: dict[str, float]) -> list[tuple[int, Summary]]:
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
    return [(step, Summary(value=values))] if values else []


def _text(tag: str, text: str) -> Summary.Value:
    described = text_metadata.create_summary_metadata(display_name="", description="")
    described.data_class = DATA_CLASS_TENSOR
    # Without dimensions: a vector of one string would be shown as a table.
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=described, tensor=tensor)
