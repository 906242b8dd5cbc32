"""How every demo trains: a real Lightning trainer, with a bar on the terminal and nothing else said."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

_NOTES = (".*does not have many workers", ".*smaller than the logging interval", ".*treespec, LeafSpec")


def fit(
    module: LightningModule,
    batches: Iterable[Any],
    callbacks: Sequence[Callback] = (),
    log_root: Path | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    clip: float | None = None,
) -> tuple[float, Path | None]:
    """Trains for one epoch.

    Args:
        module: What is trained.
        batches: What it is trained on.
        callbacks: Such as ``[TrainingDiagnostics()]``.
        log_root: Where a new ``version_N`` folder is made; None logs nothing and shows no progress.
        held_out: What it is validated on at the end.
        clip: Global norm that gradients are clipped at; None for none.

    Returns:
        Wall clock in seconds, and the folder of the log, None without one.
    """
    with _quiet():
        trainer = Trainer(
            accelerator="cpu",  # so small a model gains nothing from an accelerator, and the numbers stay comparable
            devices=1,
            max_epochs=1,
            gradient_clip_val=clip,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            logger=False if log_root is None else TensorBoardLogger(log_root, name=""),
            callbacks=[*callbacks, *([] if log_root is None else [_ProgressBar(leave=True)])],
            enable_progress_bar=log_root is not None,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        began = time.perf_counter()
        trainer.fit(module, batches, held_out)
        seconds = time.perf_counter() - began
    return seconds, Path(trainer.log_dir) if trainer.logger and trainer.log_dir else None


class _ProgressBar(RichProgressBar):
    """Room on a narrow terminal for the loss: the folder's number is told at the end."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's notes on devices, workers and short runs are right, and would hide the story."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for note in _NOTES:
                warnings.filterwarnings("ignore", message=note)
            yield
    finally:
        logger.setLevel(level)
