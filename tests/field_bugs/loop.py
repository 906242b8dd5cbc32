"""A plain training loop around the engine, for bugs that need a live run to show themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.engine.diagnostics import Diagnostics

Change = Callable[[int, nn.Module], None]


def gpt(seed: int = 0, **config: int) -> GPT:
    """Two layers, two heads, one width: small enough to be checked by hand."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"layers": 2, "width": 16, "heads": 2, "context": 16, **config}))


def batch(step: int, size: int = 4, length: int = 16) -> Tensor:
    """Tokens ``[size, length + 1]``, the same ones for the same step."""
    return torch.randint(256, (size, length + 1), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])[0]
    return loss


def train(
    model: nn.Module,
    *,
    steps: int = 3,
    micro_batches: int = 1,
    size: int = 4,
    length: int = 16,
    before_gradients: Change | None = None,
    every_n_steps: int = 1,
    **settings: Any,
) -> Diagnostics:
    """Trains with AdamW; ``before_gradients(step, model)`` may change gradients as if backward had made them so."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    settings = {"terminal": False, "max_overhead": None, **settings}
    diagnostics = Diagnostics(model, optimizer, every_n_steps=every_n_steps, **settings)
    for step in range(steps):
        with diagnostics.step() as s:
            for part in batch(step, size, length).chunk(micro_batches):
                (s.loss(loss_of(model, part)) / micro_batches).backward()
            if before_gradients is not None:
                before_gradients(step, model)
            s.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    return diagnostics
