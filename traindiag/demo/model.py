"""A small decoder-only Transformer in plain PyTorch, written the way its users would write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Shape of a :class:`GPT`.

    Args:
        layers: Number of blocks.
        width: Size of the residual stream.
        heads: Attention heads; must divide ``width``.
        context: Longest sequence.
        vocabulary: Number of tokens; 256 for bytes.
        qk_norm: LayerNorm on queries and keys, per head (Dehghani et al. 2023, arXiv 2302.05442).
    """

    layers: int = 3
    width: int = 64
    heads: int = 4
    context: int = 128
    vocabulary: int = 256
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and {self.heads} heads")


class Attention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size = config.width // config.heads
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.query_norm = nn.LayerNorm(size, bias=False) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(size, bias=False) if config.qk_norm else nn.Identity()
        self.project = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value, is_causal=True)
        out: Tensor = self.project(y.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Pre-LN block: attention, then a GELU network four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """Decoder-only Transformer with learned positions and an untied output layer.

    Example:
        >>> model = GPT(GPTConfig(layers=1, width=8, heads=2, context=16))
        >>> model(torch.zeros(4, 16, dtype=torch.long)).shape
        torch.Size([4, 16, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, length, vocabulary]`` of the next token, from tokens ``[batch, length]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.final_norm(x))
        return logits


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and the training loss: cross-entropy plus ``z_loss`` times the mean of ``log(Z)**2``.

    Args:
        logits: ``[batch, length, vocabulary]``.
        targets: ``[batch, length]``.
        z_loss: Weight of the penalty that keeps ``log Z`` near zero; 1e-4 is usual (Chowdhery et al. 2022,
            arXiv 2204.02311 section 5).

    Returns:
        Both 0-d, in nats per token.

    Example:
        >>> loss, total = next_token_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long), z_loss=0.5)
        >>> round(loss.item(), 4), round((total - loss).item(), 4)  # log Z = log 4 everywhere
        (1.3863, 0.9609)
    """
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if not z_loss:
        return loss, loss
    return loss, loss + z_loss * logits.logsumexp(-1).square().mean()
