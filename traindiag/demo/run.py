"""One training run under a real Lightning trainer, with the callback and nothing else added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader

from traindiag.demo.data import Windows, standard_library
from traindiag.demo.fit import fit
from traindiag.demo.model import GPT, GPTConfig, next_token_loss

UNSTABLE_LR = 0.1
"""Too high for this model. Attention logits pass 1e3 well before the loss shows anything, and it ends damaged."""

HEALTHY_LR = 2e-3
"""An ordinary learning rate for a model of this size; :mod:`traindiag.demo.band` was measured with it."""

HEAD_SIZE = 16
VALIDATION_WINDOWS = 256
_VALIDATION_SEED = 12345  # the same windows whatever the run's seed: validation losses of runs can be compared


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run of the demo is made of.

    Args:
        lr: Peak learning rate.
        steps: Optimizer steps, one in forty of them warm-up.
        layers: Blocks of the model.
        width: Size of its residual stream, a multiple of 16 (the size of a head).
        qk_norm: LayerNorm on queries and keys.
        z_loss: Weight of the z-loss, 0 for none.
        seed: Of the weights and of the data.
        batch: Windows a step.
        context: Bytes in a window.
    """

    lr: float
    steps: int = 400
    layers: int = 3
    width: int = 64
    qk_norm: bool = False
    z_loss: float = 0.0
    seed: int = 0
    batch: int = 16
    context: int = 128

    def __post_init__(self) -> None:
        if self.width < HEAD_SIZE or self.width % HEAD_SIZE:
            raise ValueError(f"width must be a multiple of {HEAD_SIZE}, the size of a head; got {self.width}")
        for name in ("lr", "steps", "layers", "batch", "context"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def model(self) -> GPTConfig:
        """Shape of the model."""
        return GPTConfig(self.layers, self.width, self.width // HEAD_SIZE, self.context, qk_norm=self.qk_norm)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Args:
        settings: What was run.
        losses: Training cross-entropy, one a step, nats per byte.
        validation: Cross-entropy on held-out files at the end, nats per byte.
        seconds: Wall clock of the fit.
        log_dir: Folder of its event file, None without a log.
    """

    settings: Settings
    losses: tuple[float, ...]
    validation: float
    seconds: float
    log_dir: Path | None


class ByteModel(LightningModule):
    """Next-byte prediction: AdamW (0.9, 0.95), a short linear warm-up, cosine to a tenth of the peak."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.model = GPT(settings.model())
        self.losses: list[Tensor] = []
        self.validation: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Returns the training loss; what is kept and logged is the cross-entropy in it."""
        inputs, targets = batch
        loss, total = next_token_loss(self.model(inputs), targets, self.settings.z_loss)
        self.losses.append(loss.detach())
        self.log("train/loss", loss, prog_bar=True)
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Logs the cross-entropy on held-out files."""
        inputs, targets = batch
        loss, _ = next_token_loss(self.model(inputs), targets)
        self.validation.append(loss)
        self.log("validation/loss", loss)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One optimizer, its schedule stepped every step."""
        s = self.settings
        optimizer = torch.optim.AdamW(self.parameters(), lr=s.lr, betas=(0.9, 0.95))
        warmup = max(1, s.steps // 40)
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        fall = CosineAnnealingLR(optimizer, T_max=max(1, s.steps - warmup), eta_min=s.lr / 10)
        schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(settings: Settings, callbacks: Sequence[Callback] = (), log_root: Path | None = None) -> Outcome:
    """Trains one model; the numbers are the same with any callbacks that only watch.

    Args:
        settings: What to run.
        callbacks: Such as ``[TrainingDiagnostics()]``.
        log_root: Where a new ``version_N`` folder is made; None logs nothing and shows no progress.
    """
    seed_everything(settings.seed, verbose=False)
    train_text, validation_text = standard_library()
    length, batch = settings.context, settings.batch
    loader = DataLoader(Windows(train_text, settings.steps * batch, length, settings.seed), batch)
    held_out = DataLoader(Windows(validation_text, VALIDATION_WINDOWS, length, _VALIDATION_SEED), 64)
    module = ByteModel(settings)
    seconds, log_dir = fit(module, loader, callbacks, log_root, held_out=held_out, clip=1.0)
    return Outcome(
        settings,
        tuple(torch.stack(module.losses).tolist()),
        torch.stack(module.validation).mean().item() if module.validation else math.nan,
        seconds,
        log_dir,
    )
