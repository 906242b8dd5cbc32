"""Where a monitor looks into the forward pass, and what it is handed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention, seen in the forward pass. Everything is detached; keep none of it.

    Either ``query`` and ``key`` are there (fused kernels), or ``scores`` (attention written out before a softmax),
    or all of them, when the product that made the scores was seen too.

    Args:
        layer: Name of the innermost watched module that made the call.
        query: ``[batch, heads, rows, size]``, in the precision that the kernel uses.
        key: ``[batch, key heads, columns, size]``; fewer heads than ``query`` under grouped-query attention.
        mask: Boolean (True: may attend) or additive, broadcastable to ``[batch, heads, rows, columns]``.
        is_causal: Row ``i`` attends to columns ``j <= i``.
        scale: Factor on the product of query and key.
        scores: ``[batch, heads, rows, columns]`` as they enter the softmax, scale and mask included.
        logsumexp: ``[batch, heads, rows]`` as the kernel saved it, or None.
        heads: Number of query heads.
    """

    layer: str
    heads: int
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    scores: Tensor | None = None
    logsumexp: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionTap:
    """Calls ``observe`` with every attention call of a watched module in a sampled training step."""

    observe: Callable[[AttentionCall], None]


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module, seen when it returns. Detached; keep nothing of it.

    Args:
        layer: Name of the module.
        output: ``[..., features]``, the first floating-point tensor of two or more dimensions that it returned, with
            the features moved last where a convolution has them in dimension 1.
    """

    layer: str
    output: Tensor


@dataclass(frozen=True, slots=True)
class ModuleTap:
    """Calls ``observe`` with every call of these modules in a sampled training step.

    Args:
        modules: Names of watched modules.
        observe: Takes the call.
    """

    modules: Sequence[str]
    observe: Callable[[ModuleCall], None]


@dataclass(frozen=True, slots=True)
class LossCall:
    """One call of cross-entropy that trains, or the output of a named head. Everything is detached; keep none of it.

    Either ``logits`` are there, or ``hidden`` and ``weight`` of a loss that never builds them: they would be
    ``hidden @ weight.T + bias``, times ``scale``, and ``softcap * tanh(. / softcap)`` of that.

    Args:
        site: Innermost watched module that made the call, or the function of the program that did.
        logits: ``[..., classes]``, a view of what was passed.
        targets: Class indices ``[...]``; None for class probabilities, and where only the head is seen.
        ignore_index: Tokens with this target do not count.
        hidden: ``[..., features]``.
        weight: ``[classes, features]``.
        bias: ``[classes]`` or None.
        head: Name of the module whose weight it is, where the loss was recognised by it.
        scale: A factor.
        softcap: A bound, or None.
    """

    site: str
    logits: Tensor | None = None
    targets: Tensor | None = None
    ignore_index: int = -100
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    head: str = ""
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class LossTap:
    """Calls ``observe`` with every cross-entropy call of a sampled training step, or every output of ``head``.

    Args:
        observe: What is called.
        head: Name of the watched module whose output are the logits; None to look at cross-entropy calls.
        tokens: Number of tokens that are looked at in a call, at most.
    """

    observe: Callable[[LossCall], None]
    head: str | None = None
    tokens: int = 128


Tap = AttentionTap | ModuleTap | LossTap
