"""Recognises attention among the calls that a forward pass makes, and turns each into an :class:`AttentionCall`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.capture import torch_private
from traindiag.capture.taps import AttentionCall

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_ADDING_PRODUCT = frozenset({torch.baddbmm, Tensor.baddbmm})
_PRODUCT = _ADDING_PRODUCT | {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_EINSUM = torch.einsum
_FUSED = F.scaled_dot_product_attention
WATCHED_FUNCTIONS = _SOFTMAX | _PRODUCT | {_EINSUM, _FUSED}
"""Bound at import: some names are replaced for the time of a multi-head call."""

REPLACED_IN_MULTI_HEAD = ((F, "scaled_dot_product_attention"), (F, "softmax"), (torch, "bmm"), (torch, "baddbmm"))
"""What ``F.multi_head_attention_forward`` calls, as it looks it up: a function mode sees only the call around it."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_PRODUCTS_KEPT = 4


@dataclass(slots=True)
class Site:
    """A module while it runs, and the products in it that may turn out to be attention scores.

    Args:
        name: Clean name of the module.
        module: The module, which may know its number of heads.
        heads: Number of heads where the caller said it.
        query_scale: Factor that the caller has put on the queries already.
    """

    name: str
    module: nn.Module
    heads: int | None = None
    query_scale: float = 1.0
    products: list[_Product] = field(default_factory=list)
    skip_product: bool = False


@dataclass(frozen=True, slots=True)
class _Product:
    numel: int
    columns: int
    query: Tensor | None = None
    key: Tensor | None = None


Told = Callable[[AttentionCall], None]
Refused = Callable[[str, str], None]


def run(
    site: Site,
    caller: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tell: Told,
    refuse: Refused,
) -> Any:
    """Calls ``function`` unchanged and looks at what went in and came out.

    Args:
        site: Where products and softmax of one attention meet.
        caller: Name of the innermost module, the layer of a fused call.
        function: One of :data:`WATCHED_FUNCTIONS`.
        args: Its arguments.
        kwargs: Its keyword arguments.
        tell: Takes an attention call.
        refuse: Takes layer and reason of one that cannot be looked at.
    """
    if function in _SOFTMAX:  # before the call, which may write into its input
        call = _guarded(lambda: _eager(site, args, kwargs), caller, refuse)
        if call is not None:
            tell(call)
        return function(*args, **kwargs)
    output = function(*args, **kwargs)
    if function is _FUSED:
        call = _guarded(lambda: _fused(site, caller, output, args, kwargs, refuse), caller, refuse)
        if call is not None:
            tell(call)
    else:
        _guarded(lambda: _remember(site, function, output, args, kwargs), caller, refuse)
    return output


def _guarded(look: Callable[[], AttentionCall | None], layer: str, refuse: Refused) -> AttentionCall | None:
    """A surprise in our reading of a call must not end a run: the layer is then told as unseen."""
    try:
        with torch.no_grad():
            return look()
    except Exception as error:
        refuse(layer, f"this call was not understood: {type(error).__name__}: {error}")
        return None


def _fused(
    site: Site, caller: str, output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], refuse: Refused
) -> AttentionCall | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args)), **kwargs}
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    odd = next((t for t in (query, key, mask) if t is not None and not torch_private.is_plain(t)), None)
    if odd is not None:
        refuse(caller, f"tensors of type {type(odd).__name__} are not looked into")
        return None
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logsumexp = torch_private.saved_logsumexp(output)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # the kernel will see what autocast makes of these
        dtype = torch.get_autocast_dtype(device)
        query, key, mask = (
            t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (query, key, mask)
        )
    folded = _folded(site, query)
    query, key = (_unfold(t.detach(), folded) for t in (query, key))
    if mask is not None:
        mask = mask.detach()
        mask = _unfold(mask, folded) if mask.ndim == 3 and len(mask) == query.shape[:2].numel() else mask
    if logsumexp is not None and logsumexp.shape[:-1] != query.shape[:-2]:
        logsumexp = None
    return AttentionCall(
        layer=caller,
        heads=query.shape[-3] if query.ndim > 3 else 1,
        query=query,
        key=key,
        mask=mask,
        is_causal=bool(given.get("is_causal", False)),
        scale=float(scale),
        logsumexp=logsumexp,
    )


def _eager(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall | None:
    scores = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(scores, Tensor) or scores.ndim < 3 or dim not in (-1, scores.ndim - 1):
        return None
    product = next((p for p in site.products if p.numel == scores.numel() and p.columns == scores.shape[-1]), None)
    if product is None or not torch_private.is_plain(scores):
        return None
    site.products.clear()
    site.skip_product = True  # the next product is that of weights and values
    folded = _folded(site, scores)
    scores = _unfold(scores.detach(), folded)
    query, key = product.query, product.key
    if query is not None and key is not None:
        heads = scores.shape[-3] if scores.ndim > 3 else 1
        if query.ndim == 3 and scores.ndim == 4:
            query, key = (t.reshape(len(scores), -1, *t.shape[1:]) for t in (query, key))
        fits = query.ndim == scores.ndim and key.ndim == scores.ndim and query.shape[-3] == heads
        if not fits or heads % key.shape[-3]:
            query = key = None
    return AttentionCall(
        layer=site.name,
        heads=scores.shape[-3] if scores.ndim > 3 else 1,
        query=query,
        key=key,
        scores=scores,
    )


def _remember(
    site: Site, function: Callable[..., Any], output: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if output.ndim < 3 or not torch_private.is_plain(output):
        return
    operands = [*(args[1:] if function in _ADDING_PRODUCT or function is _EINSUM else args), *kwargs.values()]
    if function is _EINSUM:
        operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
        if len(operands) != 2:
            return
    left, right = operands[:2]
    if not (_is_activation(left) and _is_activation(right)):
        return
    pair = _einsum_pair(args[0], left, right) if function is _EINSUM else (left, right.transpose(-1, -2))
    if site.skip_product:
        site.skip_product = False
        return
    query, key = pair or (None, None)
    if query is not None and key is not None:
        query, key = query.detach() / site.query_scale if site.query_scale != 1 else query.detach(), key.detach()
    site.products.append(_Product(output.numel(), output.shape[-1], query, key))
    del site.products[:-_PRODUCTS_KEPT]


def _is_activation(x: object) -> bool:
    """Not a weight nor a view of one: a router multiplies tokens with a weight, attention tokens with tokens."""
    return (
        isinstance(x, Tensor)
        and x.ndim >= 3
        and not isinstance(x, nn.Parameter)
        and not isinstance(x._base, nn.Parameter)
    )


def _einsum_pair(equation: str, *operands: Tensor) -> tuple[Tensor, Tensor] | None:
    """Query and key as ``[..., rows, size]``, where the equation is a product of two batches of matrices."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    if "." in equation or len(out) < 3:
        return None
    letters = inputs.split(",")
    which = 0 if out[-1] in letters[0] else 1
    key, query = operands[which], operands[1 - which]
    key_letters, query_letters = letters[which], letters[1 - which]
    size = [c for c in key_letters if c in query_letters and c not in out]
    row = out[-2]
    if len(size) != 1 or row not in query_letters or row in key_letters or out[-1] in query_letters:
        return None
    shared = [c for c in out[:-2] if c in query_letters and c in key_letters]
    if len(shared) != len(out) - 2:
        return None

    def order(x: Tensor, names: str, last: list[str]) -> Tensor:
        return x.permute([names.index(c) for c in [*shared, *last]])

    return order(query, query_letters, [row, *size]), order(key, key_letters, [out[-1], *size])


def _folded(site: Site, x: Tensor) -> int:
    """Number of heads folded into the batch of a three-dimensional tensor, 1 for none."""
    if x.ndim != 3:
        return 1
    named = (site.heads, *(getattr(site.module, n, None) for n in _HEADS))
    heads = next((n for n in named if isinstance(n, int) and n > 1), 1)
    return heads if x.shape[0] % heads == 0 else 1


def _unfold(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 or x.ndim != 3 else x.reshape(-1, heads, *x.shape[1:])


def multi_head_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, float]:
    """Number of heads, and the factor on the queries, of a call of ``F.multi_head_attention_forward``."""
    query = args[0] if args else kwargs["query"]
    heads = args[4] if len(args) > 4 else kwargs["num_heads"]
    need_weights = args[15] if len(args) > 15 else kwargs.get("need_weights", True)
    return heads, math.sqrt(heads / query.shape[-1]) if need_weights else 1.0
