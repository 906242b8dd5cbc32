"""Real data that packages carry: the standard library's sources and help texts, scikit-learn's digits."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.early_warning.zoo import Recipe
from traindiag.demo.data import standard_library

Batch = tuple[Tensor, Tensor]
IMAGES = ("vit", "convnet", "mlp")
LABEL_FLIP_STEPS = 20


def batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """One batch a step; what they hold follows from the seed and not from the model or its optimizer.

    Args:
        recipe: Family, sizes, faults of the data.
        seed: Of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    faults = torch.Generator().manual_seed(seed + 500_000)
    draw = _images if recipe.family in IMAGES else _windows
    for step in range(recipe.steps):
        inputs, targets = draw(recipe, generator)
        yield _with_fault(recipe, step, inputs, targets, faults)


def _with_fault(recipe: Recipe, step: int, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> Batch:
    since = step - (recipe.inject_at if recipe.inject_at is not None else recipe.steps)
    if recipe.inject == "corrupt_batch" and since == 0:
        if inputs.is_floating_point():
            return 30 * torch.randn(inputs.shape, generator=generator), targets
        return torch.randint(256, inputs.shape, generator=generator), targets
    if recipe.inject == "label_flip" and 0 <= since < LABEL_FLIP_STEPS:
        classes = 10 if inputs.is_floating_point() else 256
        return inputs, torch.randint(classes, targets.shape, generator=generator)
    return inputs, targets


def _windows(recipe: Recipe, generator: torch.Generator) -> Batch:
    text = _text(recipe.text)
    starts = torch.randint(len(text) - recipe.context, (recipe.batch,), generator=generator)
    windows = text[starts[:, None] + torch.arange(recipe.context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _images(recipe: Recipe, generator: torch.Generator) -> Batch:
    images, labels = _digits()
    chosen = torch.randint(len(images), (recipe.batch,), generator=generator)
    return images[chosen], labels[chosen]


@functools.cache
def _text(name: str) -> Tensor:
    if name == "source":
        return standard_library()[0]
    from pydoc_data.topics import topics

    prose = "\n".join(topics[key] for key in sorted(topics)).encode()
    return torch.from_numpy(np.frombuffer(prose, np.uint8).copy())


@functools.cache
def _digits() -> Batch:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target)
