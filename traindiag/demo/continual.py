"""A small Transformer that learns English and then Python, with and without English in the second phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from traindiag.demo.data import VALIDATION_EVERY, Windows, standard_library
from traindiag.demo.fit import fit
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.monitors.stability_gap import StabilityGap

TASK = "english"
HELD_OUT = 128
"""Windows that English is evaluated on."""

EVERY = 20
"""Steps between evaluations while nothing happens."""

_HELD_OUT_SEED = 12345  # the same windows whatever the run's seed


@dataclass(frozen=True, slots=True)
class Phases:
    """What a run is made of: English documentation, then the source of the standard library.

    Args:
        replay: Share of English in each batch of the second phase.
        english: Steps of the first phase.
        python: Steps of the second one.
        seed: Of the weights and of the data.
        lr: Peak learning rate of either phase. Each falls to a tenth of it, the second one in three quarters of its
            steps and from the peak again, as is usual where training is continued.
        batch: Windows a step.
        context: Bytes in a window.
    """

    replay: float
    english: int = 1500
    python: int = 520
    seed: int = 0
    lr: float = 4e-3
    batch: int = 16
    context: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.replay <= 1:
            raise ValueError(f"replay must be a share between 0 and 1, got {self.replay}")
        for name in ("english", "batch", "context", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.python < 0:
            raise ValueError(f"python must be at least 0, got {self.python}")

    @property
    def steps(self) -> int:
        """Of both phases."""
        return self.english + self.python

    def rate(self, step: int) -> float:
        """Learning rate of a step as a part of the peak."""
        if step < self.english:
            done, warm = step / self.english, min(1.0, (step + 1) / 20)
        else:
            done, warm = min(1.0, (step - self.english) / max(1.0, 0.75 * self.python)), 1.0
        return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def documentation() -> tuple[Tensor, Tensor]:
    """English text that comes with Python: training and held-out part, uint8 ``[bytes]`` each.

    They are the topics of ``help()``, each tenth of which is held out.

    Example:
        >>> train, held_out = documentation()
        >>> train.dtype, len(train) > 8 * len(held_out) > 40_000
        (torch.uint8, True)
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
    parts = ("\n\n".join(topics[n] for n in names if (n in held_out) is out).encode() for out in (False, True))
    train, rest = (torch.from_numpy(np.frombuffer(part, np.uint8).copy()) for part in parts)
    return train, rest


class TwoPhases(Dataset[tuple[Tensor, Tensor]]):
    """Windows in the order of training: English, then Python with English mixed in.

    Example:
        >>> old, new = torch.zeros(99, dtype=torch.uint8), torch.ones(99, dtype=torch.uint8)
        >>> data = TwoPhases(Phases(0.5, english=1, python=2, batch=4, context=8), old, new)
        >>> [int(data[i][0][0]) for i in range(len(data))]
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    """

    def __init__(self, phases: Phases, english: Tensor, python: Tensor) -> None:
        count = phases.steps * phases.batch
        self.english = Windows(english, count, phases.context, phases.seed)
        self.python = Windows(python, count, phases.context, phases.seed + 1_000_000)
        self.phases = phases

    def __len__(self) -> int:
        return len(self.english)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        step, slot = divmod(index, self.phases.batch)
        kept = step < self.phases.english or slot < round(self.phases.replay * self.phases.batch)
        return (self.english if kept else self.python)[index]


class TwoPhaseModel(LightningModule):
    """Next-byte prediction with AdamW (0.9, 0.95)."""

    def __init__(self, phases: Phases) -> None:
        super().__init__()
        self.phases = phases
        self.model = GPT(GPTConfig(layers=2, width=64, heads=4, context=phases.context))
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss, _ = next_token_loss(self.model(inputs), targets)
        self.losses.append(loss.detach())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.phases.lr, betas=(0.9, 0.95))
        schedule = LambdaLR(optimizer, self.phases.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def english_loss(module: TwoPhaseModel, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """What English is measured by: cross-entropy summed over bytes, and their number."""
    inputs, targets = batch
    logits: Tensor = module.model(inputs)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, targets.numel()


def stability_gap(phases: Phases) -> StabilityGap:
    """The monitor with the held-out English, the same windows for every run."""
    windows = Windows(documentation()[1], HELD_OUT, phases.context, _HELD_OUT_SEED)
    return StabilityGap(
        {TASK: DataLoader(windows, batch_size=HELD_OUT)}, english_loss, higher_is_better=False, every=EVERY
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Args:
        phases: What was run.
        losses: Training loss, one a step, nats per byte.
        seconds: Wall clock of the fit.
        log_dir: Folder of its event file, None without a log.
    """

    phases: Phases
    losses: tuple[float, ...]
    seconds: float
    log_dir: Path | None


def train(phases: Phases, callbacks: Sequence[Callback] = (), log_dir: Path | None = None) -> Outcome:
    """Trains one model; the numbers are the same with any callbacks that only watch.

    Args:
        phases: What to run.
        callbacks: Such as ``[TrainingDiagnostics(monitors=[stability_gap(phases)])]``.
        log_dir: Where a new ``version_N`` folder is made; None logs nothing and shows no progress.
    """
    seed_everything(phases.seed, verbose=False)
    data = TwoPhases(phases, documentation()[0], standard_library()[0])
    module = TwoPhaseModel(phases)
    seconds, folder = fit(module, DataLoader(data, phases.batch), callbacks, log_dir, clip=1.0)
    return Outcome(phases, tuple(torch.stack(module.losses).tolist()), seconds, folder)
