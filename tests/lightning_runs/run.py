"""A small real run under Lightning: a Transformer on the standard library's text, in the variants users have."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from traindiag.demo.data import Windows, standard_library
from traindiag.demo.model import GPT, GPTConfig, next_token_loss

CONTEXT = 32
_TEXT = standard_library()[0][:200_000]


class DropoutGPT(nn.Module):
    """The demo's model with dropout and, if asked, activation checkpointing around each block."""

    def __init__(self, dropout: float = 0.0, checkpointing: str | None = None, qk_scale: float = 1.0) -> None:
        super().__init__()
        self.net = GPT(GPTConfig(layers=2, width=32, heads=2, context=CONTEXT))
        self.dropout = dropout
        self.checkpointing = checkpointing
        with torch.no_grad():
            for block in self.net.blocks:
                block.attention.query_key_value.weight[:64] *= qk_scale

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.net.token_embedding(tokens) + self.net.position_embedding.weight[: tokens.shape[1]]
        for block in self.net.blocks:
            x = F.dropout(x, self.dropout, self.training)
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.net.head(self.net.final_norm(x))


@dataclass
class Trace:
    """What a run left behind, to be compared bit for bit."""

    losses: list[Tensor] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    rng: Tensor | None = None

    def equals(self, other: Trace) -> bool:
        return (
            len(self.losses) == len(other.losses)
            and all(a.equal(b) for a, b in zip(self.losses, other.losses))
            and self.batches == other.batches
            and all(a.equal(b) for a, b in zip(self.parameters, other.parameters))
            and self.rng is not None
            and other.rng is not None
            and self.rng.equal(other.rng)
        )


class Automatic(LightningModule):
    """One AdamW, as most people train."""

    def __init__(self, model: nn.Module, trace: Trace, lr: float = 3e-3) -> None:
        super().__init__()
        self.model = model
        self.trace = trace
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val/loss", next_token_loss(self.model(inputs), targets)[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def _loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        self.trace.batches.append(hashlib.sha256(inputs.numpy().tobytes()).hexdigest()[:8])
        loss = next_token_loss(self.model(inputs), targets)[0]
        self.trace.losses.append(loss.detach().clone())
        return loss


class Manual(Automatic):
    """Two optimizers under manual optimization: the head steps twice a batch, the body once."""

    def __init__(self, model: nn.Module, trace: Trace, lr: float = 3e-3) -> None:
        super().__init__(model, trace, lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        head, body = self.optimizers()
        for optimizers in ((head,), (head, body)):
            loss = self._loss(batch)
            for optimizer in (head, body):
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        head = list(self.model.net.head.parameters())
        ids = {id(p) for p in head}
        body = [p for p in self.parameters() if id(p) not in ids]
        return [torch.optim.AdamW(head, lr=self.lr), torch.optim.SGD(body, lr=self.lr)]


def loader(steps: int, batch: int = 4, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(Windows(_TEXT, steps * batch, CONTEXT, seed), batch_size=batch, shuffle=True)


def fit(
    callbacks: Sequence[Callback] = (),
    *,
    steps: int = 6,
    manual: bool = False,
    dropout: float = 0.0,
    checkpointing: str | None = None,
    qk_scale: float = 1.0,
    lr: float = 3e-3,
    folder: Path | None = None,
    seed: int = 0,
    module: LightningModule | None = None,
    trace: Trace | None = None,
    ckpt_path: str | None = None,
    validation: bool = True,
    **trainer: Any,
) -> Trace:
    """Trains and gives back the trace."""
    trace = trace or Trace()
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    if module is None:
        module = (Manual if manual else Automatic)(DropoutGPT(dropout, checkpointing, qk_scale), trace, lr)
    accumulate = trainer.get("accumulate_grad_batches", 1)
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "max_steps": steps * (3 if manual else 1),
        "val_check_interval": max(1, steps * accumulate // 2) if validation else None,
        "limit_val_batches": 1 if validation else 0,
        "num_sanity_val_steps": 1,
        "default_root_dir": folder,
        **trainer,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            devices=options.pop("devices", 1),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **options,
        ).fit(module, loader(steps * accumulate), loader(2, seed=1), ckpt_path=ckpt_path)
    trace.parameters = [p.detach().clone() for p in module.parameters()]
    trace.rng = torch.get_rng_state()
    return trace
