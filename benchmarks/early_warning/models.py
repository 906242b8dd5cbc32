"""The models of the zoo, small and written the way their users would write them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.early_warning.zoo import Recipe
from traindiag.demo.model import GPT, Block, GPTConfig

HEAD_SIZE = 8
CLASSES = 10
BYTES = 256
SIDE = 8
"""Digits are 8 by 8 pixels."""

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def build(recipe: Recipe) -> nn.Module:
    """A fresh model, drawn from torch's global generator.

    Args:
        recipe: What to build. Its switches draw no numbers: recipes that differ in them only begin alike.
    """
    model: nn.Module
    if recipe.family == "gpt":
        heads = recipe.width // HEAD_SIZE
        model = GPT(GPTConfig(recipe.depth, recipe.width, heads, recipe.context, BYTES, qk_norm=recipe.qk_norm))
    elif recipe.family in ("llama", "gpt2"):
        model = _hugging_face(recipe)
    else:
        model = {"vit": ViT, "convnet": ConvNet, "rnn": RNN, "mlp": MLP}[recipe.family](recipe)
    if not recipe.norm:
        _drop_norms(model)
    if recipe.init_gain != 1:
        _scale(model, recipe.init_gain)
    return model


class Logits(nn.Module):
    """A Hugging Face language model as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


class NormedHeads(nn.Module):
    """A projection followed by a normalisation of each head, for the first ``parts`` of the streams it makes."""

    def __init__(self, project: nn.Module, streams: int, parts: int, heads: int, size: int) -> None:
        super().__init__()
        self.project = project
        self.streams, self.heads = streams, heads
        self.qk_norm = nn.ModuleList(nn.LayerNorm(size, bias=False) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        streams = list(self.project(x).chunk(self.streams, dim=-1))
        for i, norm in enumerate(self.qk_norm):
            streams[i] = norm(streams[i].unflatten(-1, (self.heads, -1))).flatten(-2)
        return torch.cat(streams, -1)


def _hugging_face(recipe: Recipe) -> nn.Module:
    import transformers

    heads = recipe.width // HEAD_SIZE
    if recipe.family == "llama":
        model: nn.Module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=BYTES,
                bos_token_id=None,
                eos_token_id=None,
                hidden_size=recipe.width,
                intermediate_size=3 * recipe.width,
                num_hidden_layers=recipe.depth,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=recipe.context,
                initializer_range=recipe.width**-0.5,
            )
        )
        if recipe.qk_norm:
            for layer in model.model.layers:
                for name in ("q_proj", "k_proj"):
                    project = getattr(layer.self_attn, name)
                    setattr(layer.self_attn, name, NormedHeads(project, 1, 1, heads, HEAD_SIZE))
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=BYTES,
                bos_token_id=None,
                eos_token_id=None,
                n_positions=recipe.context,
                n_embd=recipe.width,
                n_layer=recipe.depth,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        if recipe.qk_norm:
            for layer in model.transformer.h:
                layer.attn.c_attn = NormedHeads(layer.attn.c_attn, 3, 2, heads, HEAD_SIZE)
    return Logits(model)


class ViT(nn.Module):
    """Patches of 2 by 2 pixels, pre-LN blocks without a causal mask, the mean of the patches."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, recipe.width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(SIDE * SIDE // 4, recipe.width))
        heads = recipe.width // HEAD_SIZE
        config = GPTConfig(recipe.depth, recipe.width, heads, SIDE * SIDE // 4, 1, qk_norm=recipe.qk_norm)
        self.blocks = nn.ModuleList(ImageBlock(config) for _ in range(recipe.depth))
        self.final_norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.final_norm(x).mean(1))
        return logits


class ImageBlock(Block):
    """A block of the GPT whose attention sees all patches."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.attention.forward = self._attend  # type: ignore[method-assign]

    def _attend(self, x: Tensor) -> Tensor:
        a = self.attention
        batch, length, width = x.shape
        split = a.query_key_value(x).view(batch, length, 3, a.heads, width // a.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(a.query_norm(query), a.key_norm(key), value)
        out: Tensor = a.project(y.transpose(1, 2).reshape(batch, length, width))
        return out


class ConvNet(nn.Module):
    """Convolutions of 3 by 3 with a pool after each second one."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        channels = [1] + [recipe.width] * recipe.depth
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.GroupNorm(4, b),
                _ACTIVATIONS[recipe.activation](),
                *([nn.MaxPool2d(2)] if i in (1, 3) else []),
            )
            for i, (a, b) in enumerate(itertools.pairwise(channels))
        )
        side = SIDE // 2 ** sum(i in (1, 3) for i in range(recipe.depth))
        self.head = nn.Linear(recipe.width * side * side, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        logits: Tensor = self.head(images.flatten(1))
        return logits


class RNN(nn.Module):
    """Bytes in, bytes out: an LSTM, or a plain recurrent network where ``activation`` is tanh."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, recipe.width)
        kind = nn.RNN if recipe.activation == "tanh" else nn.LSTM
        self.recurrent = kind(recipe.width, recipe.width, recipe.depth, batch_first=True)
        self.head = nn.Linear(recipe.width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


class MLP(nn.Module):
    """Layers of one width on flattened images."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        sizes = [SIDE * SIDE] + [recipe.width] * recipe.depth
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), _ACTIVATIONS[recipe.activation]())
            for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(recipe.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def head_of(model: nn.Module) -> nn.Module:
    """The layer that makes the logits."""
    inner = model.model if isinstance(model, Logits) else model
    head: nn.Module = inner.lm_head if isinstance(model, Logits) else inner.head
    return head


def _drop_norms(model: nn.Module) -> None:
    """Takes the normalisation out of all blocks; that before the output layer stays."""
    for parent in model.modules():
        for name, child in parent.named_children():
            is_norm = "Norm" in type(child).__name__
            final = name in ("final_norm", "ln_f", "norm")
            if (
                is_norm
                and not final
                and not isinstance(parent, NormedHeads)
                and name not in ("query_norm", "key_norm")
            ):
                setattr(parent, name, nn.Identity())


def _scale(model: nn.Module, gain: float) -> None:
    """Multiplies the weights of all layers between the first and the last."""
    head = head_of(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.RNN, nn.LSTM)):
                for name, weight in module.named_parameters():
                    if name.startswith("weight"):
                        weight.mul_(gain)
            elif module is not head and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.mul_(gain)
            elif type(module).__name__ == "Conv1D":
                module.weight.mul_(gain)  # type: ignore[union-attr,operator]
