"""The callback for programs that import ``lightning.pytorch``."""

from __future__ import annotations

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    raise ImportError(
        "traindiag.TrainingDiagnostics is a callback of lightning.pytorch: run `pip install lightning`, or use "
        "traindiag.Diagnostics, which watches any loop"
    ) from error

from traindiag.adapters.lightning import LightningHooks


class TrainingDiagnostics(LightningHooks, Callback):
    """Watches a Lightning run and tells what is going wrong before the loss shows it.

    Its arguments are those of :meth:`~traindiag.adapters.callback.DiagnosticsCallback.__init__`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> diagnostics = TrainingDiagnostics(every_n_steps=20)
        >>> trainer = Trainer(callbacks=[diagnostics], logger=False, accelerator="cpu")
        >>> diagnostics.alerts
        []
    """
