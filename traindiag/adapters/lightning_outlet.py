"""Lightning's loggers as an outlet: into TensorBoard's own event file, and beside any other logger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from traindiag.engine.outlet import AggregateLogger, Outlet
from traindiag.engine.settings import Settings
from traindiag.panels.sinks import FileSink, WriterSink

Trainer: TypeAlias = Any  # of either tree
Logger: TypeAlias = Any


def outlet_for(trainer: Trainer, settings: Settings) -> Outlet:
    """Where a trainer's run is told.

    With a ``TensorBoardLogger`` everything goes into its event file: TensorBoard reads one growing file a folder.
    Otherwise the panels get an event file in a folder of their own, and aggregates also go to the loggers that are
    there. Without any log folder (``fast_dev_run``, or no logger) nothing is written.
    """
    if trainer.fast_dev_run:
        return Outlet(settings)
    tensorboard = next((lg for lg in trainer.loggers if _is(lg, "TensorBoardLogger")), None)
    if tensorboard is not None:
        others = [_aggregates_of(lg) for lg in trainer.loggers if not _is(lg, "TensorBoardLogger")]
        sink = WriterSink(tensorboard.experiment) if trainer.is_global_zero else None
        return Outlet(
            settings,
            sink=sink,
            folder=Path(tensorboard.log_dir) / "traindiag",
            show=Path(tensorboard.save_dir) if tensorboard.save_dir else Path(tensorboard.log_dir),
            loggers=others,
        )
    if not trainer.loggers:
        return Outlet(settings)
    folder = Path(trainer.log_dir or trainer.default_root_dir) / "traindiag"
    return Outlet(
        settings,
        sink=FileSink(folder),
        folder=folder,
        show=folder,
        loggers=[_aggregates_of(lg) for lg in trainer.loggers],
    )


def _is(logger: Logger, kind: str) -> bool:
    """Whether it is a ``kind`` of either tree, or derived from one."""
    return any(c.__name__ == kind for c in type(logger).__mro__)


def _aggregates_of(logger: Logger) -> AggregateLogger:
    if _is(logger, "WandbLogger"):

        def into_the_next_row(points: Mapping[str, float], step: int) -> None:
            # a row of our own would move the step on, and wandb drops what the user logs for a step gone by
            logger.experiment.log(dict(points), commit=False)

        return into_the_next_row

    def as_metrics(points: Mapping[str, float], step: int) -> None:
        logger.log_metrics(dict(points), step)

    return as_metrics
