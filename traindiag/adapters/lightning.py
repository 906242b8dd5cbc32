"""The Lightning callback: Lightning's hooks mapped onto the engine, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ImportError(
        "traindiag.TrainingDiagnostics is a Lightning callback: run `pip install lightning`, or use "
        "traindiag.Diagnostics, which watches any loop"
    ) from error
from torch import Tensor
from torch.optim import Optimizer

from traindiag.adapters.lightning_outlet import outlet_for
from traindiag.alerts.alert import Alert
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.settings import Action, Settings
from traindiag.monitors.monitor import Monitor
from traindiag.record.coverage import Coverage
from traindiag.record.series import History
from traindiag.rules.rule import Rule


class TrainingDiagnostics(Callback):
    """Watches a Lightning run and tells what is going wrong before the loss shows it.

    Args:
        monitors: Monitors beside the default ones.
        rules: Rules beside the default pack, for example ``Threshold("attention/max_logit", above=500)``.
        every_n_steps: Cadence of everything that is not measured every step.
        max_overhead: Share of the step time above which sampling backs off, on all ranks alike; None: never.
        actions: Functions that are called with every :class:`Alert`, beside its being shown.
        watch: Glob, or globs, over module names; ``"*"`` is every module that an optimizer trains.
        default_monitors: Whether attention, gradient, optimizer, wiring and loss are watched.
        default_rules: Whether the default pack judges.
        exclude: Families or names of default monitors, or names of default rules (globs), to leave out.
        fast: Whether loss and gradients are measured every step, or only with the samples.
        exact: Whether attention maxima are always exact, at a higher cost.
        layout: Whether a custom-scalars layout is written for TensorBoard.
        terminal: Whether alerts, coverage and the summary are printed.
        strict: Whether a fault in a monitor or a rule stops the run.

    Raises:
        ValueError: For a wrong setting, with its value and what was expected.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> diagnostics = TrainingDiagnostics(every_n_steps=20)
        >>> trainer = Trainer(callbacks=[diagnostics], logger=False, accelerator="cpu")
        >>> diagnostics.alerts
        []
    """

    def __init__(
        self,
        monitors: Sequence[Monitor] = (),
        rules: Sequence[Rule] = (),
        every_n_steps: int = 10,
        max_overhead: float | None = 0.02,
        actions: Sequence[Action] = (),
        watch: str | Sequence[str] = "*",
        *,
        default_monitors: bool = True,
        default_rules: bool = True,
        exclude: Sequence[str] = (),
        fast: bool = True,
        exact: bool = False,
        layout: bool = True,
        terminal: bool = True,
        strict: bool = False,
    ) -> None:
        self._settings = Settings(
            monitors=monitors,
            default_monitors=default_monitors,
            rules=rules,
            default_rules=default_rules,
            exclude=exclude,
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            actions=actions,
            watch=watch,
            fast=fast,
            exact=exact,
            layout=layout,
            terminal=terminal,
            strict=strict,
        )
        self._diagnostics: Diagnostics | None = None
        self._names: dict[int, str] = {}
        self._restored: Mapping[str, Any] | None = None
        self._stepped = False
        self._losses: list[Tensor] = []

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> TrainingDiagnostics:
        """The callback with settings from a file whose keys are the arguments above.

        Values are plain data (``1e4`` is a number). A rule or monitor is ``- Threshold: {signal: loss/value, above:
        5}``: names are those of traindiag, and of installed packages that offer them as entry points of the group
        ``traindiag.plugins``, which is also where actions come from. Nothing else is imported.

        Raises:
            ValueError: With file, line, key, what was found and what was expected.
            OSError: If the file cannot be read.
        """
        settings = Settings.from_yaml(path)
        return cls(**{f.name: getattr(settings, f.name) for f in fields(settings)})

    @property
    def alerts(self) -> list[Alert]:
        """Everything told so far, oldest first."""
        return self._diagnostics.alerts if self._diagnostics else []

    @property
    def history(self) -> History:
        """Every number measured so far, by signal."""
        return self._diagnostics.history if self._diagnostics else History()

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What is seen and what is not, with reasons."""
        return self._diagnostics.coverage if self._diagnostics else ()

    def log(self, name: str, value: Tensor | float) -> None:
        """Takes a number of your own for this step; every rule can judge it.

        Raises:
            RuntimeError: Outside of training.
        """
        if self._diagnostics is None:
            raise RuntimeError(f"diagnostics.log({name!r}, ...) needs a run: call it while the trainer fits")
        self._diagnostics.log(name, value)

    # -- hooks ---------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: before this hook, reading estimated_stepping_batches would restart a resumed data loader
        diagnostics = Diagnostics(
            pl_module,
            trainer.optimizers,
            settings=self._settings,
            outlet=outlet_for(trainer, self._settings),
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            facts=_facts(trainer),
        )
        diagnostics.measures_applied_gradients = not pl_module.automatic_optimization
        if self._restored is not None:
            diagnostics.load_state_dict(self._restored)
            self._restored = None
        self._names = {id(o): name for name, o in diagnostics.watched.optimizers.items()}
        self._diagnostics = diagnostics

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        if diagnostics.run.batch_size is None:
            diagnostics.learn(batch_size=_batch_size(batch))
        self._stepped = False
        diagnostics.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        diagnostics.before_backward()
        if not pl_module.automatic_optimization:
            # whose loss it is shows at the next optimizer step; on the device until then
            self._losses.append(loss.detach() / _loss_scale(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._diagnostics is not None:
            self._diagnostics.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        self._stepped = True
        name = self._names[id(getattr(optimizer, "optimizer", optimizer))]
        self._hand_over_losses(name)
        # fused optimizers divide by the loss scale themselves, later
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        diagnostics.gradients(name, scale=_loss_scale(trainer) if scaled else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        if pl_module.automatic_optimization:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if loss is not None:
                diagnostics.loss(loss * trainer.accumulate_grad_batches)
        else:
            self._hand_over_losses(None)
        if diagnostics.sampling:
            for name, value in trainer.callback_metrics.items():
                if isinstance(value, Tensor) and value.numel() == 1:
                    diagnostics.log(f"logged/{name}", value)
        diagnostics.end(step_done=self._stepped or not pl_module.automatic_optimization)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._diagnostics is not None:
            self._diagnostics.idle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(failed=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish()

    def state_dict(self) -> dict[str, Any]:
        if self._diagnostics is not None:
            return self._diagnostics.state_dict()
        return dict(self._restored or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    # -- inside --------------------------------------------------------------------------------

    def _finish(self, *, failed: bool = False) -> None:
        if self._diagnostics is not None:
            self._diagnostics.finish(failed=failed)

    def _hand_over_losses(self, optimizer: str | None) -> None:
        losses, self._losses = self._losses, []
        if self._diagnostics is not None:
            for loss in losses:
                self._diagnostics.loss(loss, optimizer)


def _facts(trainer: Trainer) -> dict[str, Any]:
    length = trainer.estimated_stepping_batches
    clip = trainer.gradient_clip_val
    return {
        "length": int(length) if 0 < length < float("inf") else None,
        "accumulate": trainer.accumulate_grad_batches,
        "clip": (str(trainer.gradient_clip_algorithm or "norm"), float(clip)) if clip else None,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
    }


def _loss_scale(trainer: Trainer) -> Tensor | float:
    """The loss scale as a device tensor where a scaler is at work; ``get_scale`` would wait for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else 1.0


def _batch_size(batch: Any) -> int | None:
    """Length of the first tensor's first axis."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := _batch_size(part)) is not None), None)
