"""How large the values of an activation are, and whether a few of its features carry all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 2**20
"""Values looked at one by one, at most: 4 MiB in fp32, whatever the batch and the width."""


class ActivationStatistics(NamedTuple):
    """States of one activation, each 0-d, on its device, fp32 or float64 where the input is.

    All but ``max_abs`` are sums: add them over calls, micro-batches and ranks.

    Args:
        values: Number of values.
        square_sum: Sum of their squares, over all of them.
        max_abs: Largest absolute value of all; ``-inf`` where there is none. A NaN anywhere makes it NaN.
        sampled: Number of values in the rows that were looked at one by one.
        zeros: How many of those are exactly zero.
        nonfinite: How many of those are NaN or infinite; at least 1 if any value of the activation is.
        sampled_square_sum: Sum of their squares, the weight of their kurtosis.
        weighted_kurtosis: Kurtosis of neuron RMS times that weight.
    """

    values: Tensor
    square_sum: Tensor
    max_abs: Tensor
    sampled: Tensor
    zeros: Tensor
    nonfinite: Tensor
    sampled_square_sum: Tensor
    weighted_kurtosis: Tensor


def activation_statistics(x: Tensor, *, rows: int = 256) -> ActivationStatistics:
    """States from which size, outliers, dead and broken values of an activation are computed.

    RMS and maximum are of all values; they cost one read each and no copy. The others are of rows evenly spaced over
    all leading dimensions, from the middle of each interval: the first token of a sequence, which often carries
    massive activations (Sun et al. 2024, arXiv 2402.17762), is then not over-represented.

    The kurtosis of neuron RMS is ``E_j[(E_a x_aj^2)^2] / (E_j E_a x_aj^2)^2`` over features ``j`` and rows ``a``
    (He et al. 2024, arXiv 2405.19279): 1 where all features are equally large, their number where one carries
    everything. Joining two activations exactly would take the squares of every feature. The sums kept here give the
    mean of their kurtoses weighted by their sums of squares instead, which is never below the kurtosis of both
    together (it is convex in the shares of the features) and equal to it where the same features are large in both.

    Reads nothing back to the host and does not branch on values, so it can be traced into a compiled graph.

    Args:
        x: ``[..., features]``, floating point, at least one dimension. Squares of values above 1.8e19 overflow in
            fp32: the sums are then infinite.
        rows: Rows looked at one by one, at most; fewer where there are more than 4096 features.

    Raises:
        ValueError: If ``x`` has no dimension or is not floating point, or ``rows`` is below 1.

    Example:
        >>> s = activation_statistics(torch.tensor([[3.0, 0.0], [-4.0, 0.0]]))
        >>> (s.square_sum / s.values).sqrt().item(), s.max_abs.item(), (s.zeros / s.sampled).item()
        (2.5, 4.0, 0.5)
        >>> (s.weighted_kurtosis / s.sampled_square_sum).item()  # one of two features carries everything
        2.0
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not x.ndim or not x.is_floating_point():
        raise ValueError(f"expected [..., features] in floating point, got {tuple(x.shape)} in {x.dtype}")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x if x.ndim > 1 else x[None]
        if not x.numel():
            zero = x.new_zeros((), dtype=wide)
            return ActivationStatistics(zero, zero, zero - torch.inf, zero, zero, zero, zero, zero)
        low, high = torch.aminmax(x)  # of all forms of max |x|, the one that is fast on CPU too
        max_abs = torch.maximum(high, -low).to(wide)
        features = x.shape[-1]
        sample = _evenly(x, min(rows, max(1, _ELEMENTS // features))).to(wide)
        squares = sample.square().sum(tuple(range(x.ndim - 1)))
        total = squares.sum()
        shares = squares / total.clamp_min(torch.finfo(wide).tiny)
        broken = torch.count_nonzero(sample - sample).to(wide)  # NaN - NaN and inf - inf; isfinite is slow on CPU
        return ActivationStatistics(
            values=x.new_full((), x.numel(), dtype=wide),
            square_sum=torch.linalg.vector_norm(x, dtype=wide).square(),
            max_abs=max_abs,
            sampled=x.new_full((), sample.numel(), dtype=wide),
            zeros=sample.numel() - torch.count_nonzero(sample).to(wide),
            nonfinite=torch.maximum(broken, (~max_abs.isfinite()).to(wide)),
            sampled_square_sum=total,
            weighted_kurtosis=features * shares.square().sum() * total,
        )


def _evenly(x: Tensor, rows: int) -> Tensor:
    """At most ``rows`` rows of ``[..., features]``, evenly spaced over the leading dimensions; a view.

    The dimension of which most is left is thinned by half until few enough remain.
    """
    kept, steps = list(x.shape[:-1]), [1] * (x.ndim - 1)
    while math.prod(kept) > rows:
        d = kept.index(max(kept))
        steps[d] *= 2
        kept[d] = -(-(x.shape[d] - steps[d] // 2) // steps[d])
    for d, step in enumerate(steps):
        if step > 1:
            x = x[(slice(None),) * d + (slice(step // 2, None, step),)]
    return x
