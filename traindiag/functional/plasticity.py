"""Whether the units of a layer still do something: active, dead, dormant, saturated, all from one pass."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import torch
from torch import Tensor

FLAT = 0.02
"""Share of the steepest slope below which a smooth activation counts as flat. Ours; for tanh it is |h| > 0.99, the
usual limit of saturation."""

RARE = 0.01
"""A unit that is active on fewer states is dead, on all but fewer a zombie (Dohare et al. 2024, Nature 632)."""

EPSILON = 1e-9
"""Added to the mean of a layer's activity, so that all units of a layer without any are dormant."""

RECTIFIERS = frozenset({"relu", "relu6", "leaky_relu", "prelu", "rrelu"})
"""Linear on either side: a unit that is always on the same one has become linear."""

_TAILS: dict[str, tuple[float, float]] = {
    # where |phi'| stays below FLAT max |phi'|
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0, math.inf),
    "prelu": (0.0, math.inf),
    "rrelu": (0.0, math.inf),
    "tanh": (-2.6441, 2.6441),
    "sigmoid": (-5.2882, 5.2882),
    "softsign": (-6.0711, 6.0711),
    "hardtanh": (-1.0, 1.0),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-3.0, math.inf),
    "gelu": (-2.7392, math.inf),
    "silu": (-5.2528, math.inf),
    "mish": (-5.2740, math.inf),
    "elu": (-3.9120, math.inf),
    "selu": (-3.9120, math.inf),
    "softplus": (-3.8918, math.inf),
    "logsigmoid": (-math.inf, 3.8918),
}


def active_range(activation: str, *, alpha: float = 1.0, beta: float = 1.0) -> tuple[float, float]:
    """Between which pre-activations a unit is active.

    Rectifiers are active above zero, leaky ones too: on one side for all inputs they are linear. Others are active
    outside of the tails in which their slope stays below ``FLAT`` of its largest value. The points inside at which
    the slope of GELU, SiLU and Mish passes through zero are no tails.

    Args:
        activation: Name of the function in ``torch.nn.functional``.
        alpha: That of ELU and CELU.
        beta: That of softplus.

    Returns:
        ``(low, high)``; active is ``low < a < high``.

    Raises:
        ValueError: If the activation is not known.

    Example:
        >>> active_range("relu"), active_range("tanh")
        ((0.0, inf), (-2.6441, 2.6441))
    """
    if activation == "celu":
        return alpha * math.log(FLAT), math.inf
    if activation == "elu" and alpha > 0:
        return math.log(FLAT * max(1.0, alpha) / alpha), math.inf
    if activation not in _TAILS:
        close = difflib.get_close_matches(activation, [*_TAILS, "celu"], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no activation is called {activation!r}.{hint} There are {', '.join([*_TAILS, 'celu'])}.")
    low, high = _TAILS[activation]
    return (low / beta, high) if activation == "softplus" else (low, high)


class UnitActivity(NamedTuple):
    """States of one layer, fp32 or float64 where the input is; add them over batches.

    Args:
        pairs: 0-d, number of values of each unit: states, times positions for convolutions.
        active: ``[units]``, how many of them are active; NaN where one of them is.
        magnitude: ``[units]``, sum of |h|.
        states: 0-d, number of states.
        norm: 0-d, sum over states of the norm of what enters the activation.
    """

    pairs: Tensor
    active: Tensor
    magnitude: Tensor
    states: Tensor
    norm: Tensor

    def plus(self, other: UnitActivity) -> UnitActivity:
        """Of both batches."""
        return UnitActivity(*(a + b for a, b in zip(self, other)))


def unit_activity(before: Tensor, after: Tensor, active: tuple[float, float] = (0.0, math.inf)) -> UnitActivity:
    """One pass over a layer.

    Args:
        before: ``[states, ..., units]``, what enters the activation.
        after: The same shape, what leaves it.
        active: What :func:`active_range` says.

    Raises:
        ValueError: If the shapes differ or have fewer than two dimensions.

    Example:
        >>> a = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
        >>> u = unit_activity(a, a.relu())
        >>> fraction_active(u).item(), u.active.tolist(), u.norm.item() == a.norm(dim=1).sum().item()
        (0.5, [2.0, 0.0], True)
    """
    if before.shape != after.shape or before.ndim < 2:
        raise ValueError(f"expected [states, ..., units] twice, got {tuple(before.shape)} and {tuple(after.shape)}")
    wide = torch.promote_types(before.dtype, torch.float32)
    low, high = active
    on = ((before > low) & (before < high)).to(wide).masked_fill(before.isnan(), torch.nan)
    leading = tuple(range(before.ndim - 1))
    return UnitActivity(
        pairs=before.new_full((), math.prod(before.shape[:-1]), dtype=wide),
        active=on.sum(leading),
        magnitude=after.abs().sum(leading, dtype=wide),
        states=before.new_full((), len(before), dtype=wide),
        norm=torch.linalg.vector_norm(before.flatten(1), dim=1, dtype=wide).sum(),
    )


def fraction_active(*layers: UnitActivity) -> Tensor:
    """Fraction of active units (Ma et al. 2024, arXiv 2310.07418 section 4), 0-d.

    Of one layer, or pooled over layers, states and positions as the authors' code does, so that wide layers count
    more.
    """
    active = torch.stack([u.active.sum() for u in layers]).sum()
    return active / torch.stack([u.pairs * len(u.active) for u in layers]).sum()


def dead_units(units: UnitActivity) -> Tensor:
    """Bool ``[units]``: active on less than 1 % of the states. With fewer than 100 states, on none."""
    return units.active < RARE * units.pairs


def zombie_units(units: UnitActivity) -> Tensor:
    """Bool ``[units]``: active on more than 99 % of the states; of a rectifier, linear (arXiv 2402.18762)."""
    return units.active > (1 - RARE) * units.pairs


def dormant_units(units: UnitActivity, tau: float) -> Tensor:
    """Bool ``[units]``: mean |h| at most ``tau`` of the layer's mean (Sokar et al. 2023, arXiv 2302.12902).

    A layer that shrinks as a whole has no more dormant units than before; all units of one that is zero are dormant.

    Example:
        >>> h = torch.tensor([[1.0, 0.01, 2.0]])
        >>> dormant_units(unit_activity(h, h), tau=0.025).tolist()
        [False, True, False]
    """
    mean = units.magnitude / units.pairs
    return mean / (mean.mean() + EPSILON) <= tau


def share_of(flags: Tensor, units: UnitActivity) -> Tensor:
    """Share of units for which ``flags`` hold, 0-d; NaN where a unit's numbers are."""
    broken = (units.active + units.magnitude).isnan().any()
    return flags.to(units.active.dtype).mean().masked_fill(broken, torch.nan)


class Overlap(NamedTuple):
    """How much two sets are the same, ``common / smaller``; with an empty set there is nothing to say."""

    common: Tensor
    smaller: Tensor


def overlap(first: Tensor, second: Tensor) -> Overlap:
    """Sizes from which ``|X and Y| / min(|X|, |Y|)`` follows, 0-d each.

    Args:
        first: Bool ``[units]``.
        second: The same units.

    Example:
        >>> both = overlap(torch.tensor([True, True, False]), torch.tensor([False, True, False]))
        >>> (both.common / both.smaller).item()
        1.0
    """
    return Overlap((first & second).sum(), torch.minimum(first.sum(), second.sum()))
