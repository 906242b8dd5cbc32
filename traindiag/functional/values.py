"""What a value function says of states, and how much of it changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def greedy_churn(before: Tensor, now: Tensor) -> Tensor:
    """Share of states whose greedy action is another one (Schaul et al. 2022, arXiv 2206.00730), 0-d.

    Args:
        before: ``[states, actions]``, at least two actions.
        now: The same states.

    Raises:
        ValueError: If the shapes differ or there is one action.

    Example:
        >>> greedy_churn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 3.0]])).item()
        0.5
    """
    if before.shape != now.shape or now.ndim != 2 or now.shape[1] < 2:
        raise ValueError(
            f"expected [states, actions] twice and two actions at least, got {tuple(before.shape)} and "
            f"{tuple(now.shape)}"
        )
    broken = (before.sum() + now.sum()).isnan()
    return (before.argmax(1) != now.argmax(1)).float().mean().masked_fill(broken, torch.nan)


def output_change(before: Tensor, now: Tensor) -> Tensor:
    """Mean absolute change against the mean size before, 0-d.

    Example:
        >>> output_change(torch.tensor([2.0, -2.0]), torch.tensor([3.0, -2.0])).item()
        0.25
    """
    return (now - before).abs().mean() / before.abs().mean()


def member_gap(members: Tensor) -> Tensor:
    """Mean over states and actions of the largest value less the smallest, 0-d.

    Args:
        members: ``[members, states, ...]``, two members at least.

    Raises:
        ValueError: If there is one member.

    Example:
        >>> member_gap(torch.tensor([[1.0, 2.0], [3.0, 2.5]])).item()
        1.25
    """
    if len(members) < 2:
        raise ValueError(f"expected two members at least, got {len(members)}")
    return (members.amax(0) - members.amin(0)).mean()


class ExplainedVariance(NamedTuple):
    """Sums from which the explained variance follows: ``1 - residual / total``. Add them over batches.

    Args:
        residual: Sum of squares of ``R - V`` about their mean.
        total: Sum of squares of ``R`` about their mean; where it is zero there is nothing to explain.
    """

    residual: Tensor
    total: Tensor


def explained_variance(values: Tensor, returns: Tensor) -> ExplainedVariance:
    """States of ``1 - Var(R - V) / Var(R)``, 0-d each: 1 is perfect, 0 a constant, below 0 worse than that.

    Args:
        values: ``[states]``, what the value function says.
        returns: ``[states]``, what came.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> e = explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
        >>> (1 - e.residual / e.total).item()
        1.0
    """
    if values.shape != returns.shape or values.ndim != 1:
        raise ValueError(f"expected [states] twice, got {tuple(values.shape)} and {tuple(returns.shape)}")
    left, returns = returns - values, returns.to(torch.promote_types(returns.dtype, torch.float32))
    return ExplainedVariance((left - left.mean()).square().sum(), (returns - returns.mean()).square().sum())
