"""How many directions the features of a layer use: three ranks that are not the same."""

from __future__ import annotations

import torch
from torch import Tensor

DELTA = 0.01
EPSILON = 0.01


def singular_values(features: Tensor) -> Tensor:
    """Singular values ``[d]`` of features over states, largest first, float64 on the host; not centred.

    They are roots of the eigenvalues of the ``d x d`` matrix of inner products, which is much faster than a
    decomposition of all states and exact to 1e-8 of the largest one. This waits for the device.

    Args:
        features: ``[n, d]``, floating point.

    Raises:
        ValueError: If there are fewer states than features: a rank is then that of the states.

    Example:
        >>> singular_values(torch.eye(3)[:, :2]).tolist()
        [1.0, 1.0]
    """
    if features.ndim != 2 or len(features) < features.shape[1]:
        raise ValueError(f"expected at least as many states as features, [n, d], got {tuple(features.shape)}")
    exact = features.detach().to("cpu", torch.float64)
    if not exact.isfinite().all():
        return exact.new_full((features.shape[1],), torch.nan)
    squares: Tensor = torch.linalg.eigvalsh(exact.T @ exact)
    return squares.flip(0).clamp_min(0).sqrt()


def srank(values: Tensor, delta: float = DELTA) -> Tensor:
    """The least ``k`` whose largest ``k`` singular values carry ``1 - delta`` of their sum (arXiv 2010.14498), 0-d.

    Not the stable rank ``|H|_F^2 / |H|_2^2``, whose name some code gives it. 0 where all are zero.

    Example:
        >>> srank(torch.tensor([99.0, 1.0, 0.0])).item(), srank(torch.tensor([1.0, 1.0])).item()
        (1.0, 2.0)
    """
    total = values.sum()
    short = (values.cumsum(0) < (1 - delta) * total - 1e-12 * total).sum()
    return torch.where(total > 0, short + 1, 0).to(values.dtype).masked_fill(total.isnan(), torch.nan)


def effective_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of ``s_i / sum s`` (Roy and Vetterli 2007), 0-d; 0 where all are zero.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])).item(), 6)
        2.0
    """
    total = values.sum()
    share = values / total
    entropy = -torch.where(share > 0, share * share.log(), 0 * share).sum()
    return torch.where(total == 0, 0 * total, entropy.exp())


def feature_rank(values: Tensor, states: int, epsilon: float = EPSILON) -> Tensor:
    """Singular values of ``H / sqrt n`` above ``epsilon`` (Lyle et al. 2022, arXiv 2204.09560), 0-d.

    Against no other singular value: features that go to zero as a whole lose rank.

    Args:
        values: Singular values of ``H``.
        states: Its rows ``n``.
        epsilon: The limit.

    Example:
        >>> feature_rank(torch.tensor([1.0, 0.05]), states=100).item()
        1.0
    """
    above: Tensor = (values / states**0.5 > epsilon).sum().to(values.dtype)
    return above.masked_fill(values.isnan().any(), torch.nan)
