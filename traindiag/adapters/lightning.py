"""Lightning's hooks mapped onto the engine, and nothing else.

There are two trees of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``: the same code, but classes of their
own. The hooks here import neither; :mod:`traindiag.lightning` and :mod:`traindiag.pytorch_lightning` make a callback
of each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from traindiag.adapters.batches import batch_size
from traindiag.adapters.callback import DiagnosticsCallback
from traindiag.adapters.lightning_outlet import outlet_for
from traindiag.engine.diagnostics import Diagnostics

Trainer: TypeAlias = Any  # of either tree
LightningModule: TypeAlias = Any


class LightningHooks(DiagnosticsCallback):
    """The hooks that a ``Callback`` of either tree inherits from here."""

    _restored: Mapping[str, Any] | None = None
    _stepped = False
    _names: Mapping[int, str]
    _losses: list[Tensor]

    @property
    def log(self) -> Callable[[str, Tensor | float], None]:
        """Takes a number of your own for this step; every rule can judge it."""
        return super().log

    @log.setter
    def log(self, _: object) -> None:
        """Lightning puts the module's own ``log`` onto every callback; here that name was taken."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not earlier: before this hook, reading estimated_stepping_batches would restart a resumed data loader
        outlet = outlet_for(trainer, self._settings)
        diagnostics = Diagnostics(
            pl_module,
            trainer.optimizers,
            settings=self._settings,
            outlet=outlet,
            save=_saves(trainer, outlet.folder),
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            facts=_facts(trainer),
        )
        diagnostics.computes_in(trainer.precision_plugin.forward_context)
        diagnostics.measures_applied_gradients = not pl_module.automatic_optimization
        if self._restored is not None:
            diagnostics.load_state_dict(self._restored)
            self._restored = None
        self._names = {id(o): name for name, o in diagnostics.watched.optimizers.items()}
        self._losses = []
        self._diagnostics = diagnostics

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._diagnostics is not None:
            self._diagnostics.data(trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        self._stepped = False
        with diagnostics.border:
            if diagnostics.run.batch_size is None:
                diagnostics.learn(batch_size=batch_size(batch))
        diagnostics.begin()
        diagnostics.batch(batch, f"epoch {trainer.current_epoch}, batch {batch_idx}")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if (diagnostics := self._diagnostics) is None:
            return
        diagnostics.before_backward()
        with diagnostics.border:
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
        with diagnostics.border:
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
        with diagnostics.border:
            if pl_module.automatic_optimization:
                loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                if loss is not None:
                    parts = trainer.accumulate_grad_batches
                    diagnostics.loss(loss if parts == 1 else loss * parts)
            else:
                self._hand_over_losses(None)
            if diagnostics.sampling:
                for name, value in trainer.callback_metrics.items():
                    if isinstance(value, Tensor) and value.numel() == 1:
                        diagnostics.log(f"logged/{name}", value)
        diagnostics.end(step_done=self._stepped or not pl_module.automatic_optimization)
        if diagnostics.should_stop:
            trainer.should_stop = True

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


def _saves(trainer: Trainer, folder: Path | None) -> Callable[[str], None]:
    """Saves a checkpoint in a folder beside the log. It keeps no trainer alive."""
    asked = weakref.ref(trainer)

    def save(name: str) -> None:
        if (trainer := asked()) is None or trainer.fast_dev_run:
            return
        path = (folder or Path(trainer.default_root_dir) / "traindiag") / "checkpoints" / f"{name}.ckpt"
        trainer.save_checkpoint(trainer.strategy.broadcast(str(path)))  # ranks may not agree on the log's folder

    return save


def _loss_scale(trainer: Trainer) -> Tensor | float:
    """The loss scale as a device tensor where a scaler is at work; ``get_scale`` would wait for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else 1.0
