"""Which tensor stands for what a module returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)


def activation_of(output: object) -> Tensor | None:
    """The first floating-point tensor of two or more dimensions in what a module returned, or None.

    Looks into tuples, lists, mappings (Hugging Face outputs among them) and dataclasses, in their order.

    Example:
        >>> activation_of({"loss": torch.tensor(1.0), "hidden": (torch.ones(2, 3),)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):  # first: iterating over a tensor would walk along its batch
        return output if output.ndim >= 2 and output.dtype in _FLOATING else None
    parts: Iterable[object] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output):
        parts = (getattr(output, f.name, None) for f in fields(output))
    return next((found for part in parts if (found := activation_of(part)) is not None), None)


def features_last(module: nn.Module, output: Tensor) -> Tensor:
    """A view ``[..., features]`` of the output of ``module``; convolutions have their features in dimension 1.

    Four or more dimensions belong to a convolution where the module holds one (or a normalisation over channels),
    three where it holds nothing else, because Transformer blocks with a convolution inside return features last.
    """
    if output.ndim < 3 or not any(isinstance(m, _CHANNELS_FIRST) for m in module.modules()):
        return output
    if output.ndim == 3 and any(isinstance(m, (nn.Linear, nn.LayerNorm)) for m in module.modules()):
        return output
    return output.movedim(1, -1)
