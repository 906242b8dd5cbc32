"""Losses that never build logits: what they are given says what the logits would be.

Libraries compute head and cross-entropy together, piece by piece, in an autograd function of their own. No function
of torch's is called that could be recognised, but hidden states, the weight of a head and targets all go in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from traindiag.capture import torch_private
from traindiag.capture.taps import LossCall

_OF_TORCH = ("torch.", "traindiag.")
_CUSTOM_OPERATORS = "torch._library."
_TARGETS = ("target", "label")
_SPLIT = ("parallel", "process_group")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "temperature")
_SOFTCAPS = ("softcap", "final_logit_softcapping")

HeadOf = Callable[[Tensor], str | None]


class NotRead(Exception):
    """Why a loss could not be looked at."""


def is_of_the_program(function: type) -> bool:
    """Whether an autograd function belongs to the program or one of its libraries, not to torch itself.

    What torch makes of a custom operator that somebody has registered does not count as torch's own.
    """
    module = str(function.__module__)
    return module.startswith(_CUSTOM_OPERATORS) or not module.startswith(_OF_TORCH)


def loss_of(output: object) -> Tensor | None:
    """The loss in what a function returned: the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def read_function(
    site: str, function: type, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Tensor, head_of: HeadOf
) -> LossCall | None:
    """What an autograd function says of output logits; None where it is no such loss.

    It is one where hidden states ``[..., features]``, targets ``[...]`` and the weight ``[classes, features]`` of a
    head went in and one number, or one a token, came out. What else there is goes by its name in ``forward``.

    Args:
        site: Where it was called.
        function: The class.
        args: What ``apply`` was given.
        kwargs: What it was given by name.
        loss: What came out.
        head_of: Name of the module whose weight a tensor is, or None.

    Raises:
        NotRead: If it is such a loss and cannot be looked at.
    """
    given = dict(_named(function, args, kwargs))
    floating = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
    whole = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.dtype in (torch.int64, torch.int32)}
    if not whole or len(floating) < 2:
        return None
    for weight in (v for v in floating.values() if v.ndim == 2):
        for hidden in (v for v in floating.values() if v is not weight and v.ndim > 1):
            if hidden.shape[-1] != weight.shape[1]:
                continue
            fitting = [k for k, v in whole.items() if v.shape == hidden.shape[:-1]]
            fitting.sort(key=lambda k: not any(word in k for word in _TARGETS))
            if not fitting or loss.numel() not in (1, hidden.shape[:-1].numel()):
                continue
            head = head_of(weight)
            if head is not None:
                return _call(site, head, hidden, weight, whole[fitting[0]], given)
    return None


def _call(
    site: str, head: str, hidden: Tensor, weight: Tensor, targets: Tensor, given: Mapping[str, Any]
) -> LossCall:
    split = {n for n, v in given.items() if v is not None and v is not False and any(word in n for word in _SPLIT)}
    if split:
        raise NotRead(f"logits are never built, and the weight of {head} is split over ranks")
    wide = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.shape == weight.shape[:1]}
    bias = next((v for k, v in wide.items() if "bias" in k or isinstance(v, nn.Parameter)), None)
    for tensor in (hidden, weight, targets, bias):
        if tensor is not None and not torch_private.is_plain(tensor):
            raise NotRead(f"logits are never built, and tensors of type {type(tensor).__name__} are not looked into")
    ignore_index = given.get("ignore_index")
    ignore_index = ignore_index if type(ignore_index) is int else -100
    targets, shift, shape = targets.detach().long(), given.get("shift"), given.get("batch_shape")
    if isinstance(shift, int) and shift:
        rows = shape if isinstance(shape, torch.Size) and shape.numel() == targets.numel() else targets.shape
        targets = shifted(targets.view(rows), int(shift), ignore_index).view(targets.shape)
    return LossCall(
        site,
        targets=targets,
        ignore_index=ignore_index,
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        head=head,
        scale=scale_of(given.get),
        softcap=softcap_of(given.get),
    )


def _named(function: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by the names that ``forward`` gives them; what a dataclass among them holds counts as given too."""
    parameters = list(inspect.signature(function.forward).parameters.values())  # type: ignore[attr-defined]
    if function.setup_context is torch.autograd.Function.setup_context:  # type: ignore[attr-defined]
        parameters = parameters[1:]  # the context
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    for name, value in (*zip(names, args), *kwargs.items()):
        if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                yield field.name, getattr(value, field.name, None)
        else:
            yield name, value


def shifted(targets: Tensor, by: int, ignore_index: int) -> Tensor:
    """Each token's target is that of the token ``by`` places later; the last ones have none."""
    return torch.nn.functional.pad(targets, (0, by), value=ignore_index)[..., by:].contiguous()


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


def scale_of(of: Callable[[str], object]) -> float:
    """What logits are multiplied by, where ``of`` gives numbers by name."""
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(of(name)) or 1.0
    for name in _DIVISORS:
        scale /= _number(of(name)) or 1.0
    return scale


def softcap_of(of: Callable[[str], object]) -> float | None:
    """The bound of logits that a hyperbolic tangent keeps them in, where ``of`` gives numbers by name."""
    return next((cap for name in _SOFTCAPS if (cap := _number(of(name))) is not None), None)


def is_weight_of(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of ``module``, or a view of all of it."""
    weight = tensor_of(module, "weight")
    if weight is tensor:
        return True
    if weight is None:
        return False
    plain = torch_private.is_plain(weight) and torch_private.is_plain(tensor)
    if not plain or weight.shape != tensor.shape or weight.is_meta:
        return False
    return bool(weight.numel()) and weight.data_ptr() == tensor.data_ptr()


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or what stands in its place, without running what a parametrisation would."""
    found = module._parameters.get(name)
    found = vars(module).get(name) if found is None else found
    return found if isinstance(found, Tensor) else None
