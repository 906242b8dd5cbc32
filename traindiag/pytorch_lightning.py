"""The callback for programs that import ``pytorch_lightning``: its classes are not those of ``lightning.pytorch``."""

from __future__ import annotations

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError as error:
    raise ImportError(
        "traindiag.pytorch_lightning.TrainingDiagnostics is a callback of pytorch_lightning: run "
        "`pip install pytorch_lightning`, or use traindiag.Diagnostics, which watches any loop"
    ) from error

from traindiag.adapters.lightning import LightningHooks


class TrainingDiagnostics(LightningHooks, Callback):
    """Watches a Lightning run and tells what is going wrong before the loss shows it.

    Its arguments are those of :meth:`~traindiag.adapters.callback.DiagnosticsCallback.__init__`.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> diagnostics = TrainingDiagnostics(every_n_steps=20)
        >>> trainer = Trainer(callbacks=[diagnostics], logger=False, accelerator="cpu")
        >>> diagnostics.alerts
        []
    """
