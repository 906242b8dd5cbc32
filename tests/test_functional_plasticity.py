"""Formulas of plasticity against numpy written another way, and against the definitions as they were published."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from traindiag.functional.feature_rank import effective_rank, feature_rank, singular_values, srank
from traindiag.functional.plasticity import (
    FLAT,
    active_range,
    dead_units,
    dormant_units,
    fraction_active,
    overlap,
    share_of,
    unit_activity,
    zombie_units,
)
from traindiag.functional.values import explained_variance, greedy_churn, member_gap, output_change

seeds = st.integers(0, 2**32 - 1)


def layer(seed: int, states: int, units: int, *positions: int) -> tuple[Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((states, *positions, units)) + rng.normal(0, 1.5, units)  # some units on, some off
    return torch.from_numpy(a), a


@given(seed=seeds, states=st.integers(1, 300), units=st.integers(1, 9), positions=st.sampled_from([(), (2,), (3, 2)]))
def test_one_pass_gives_what_each_definition_asks_for(seed, states, units, positions) -> None:
    tensor, a = layer(seed, states, units, *positions)
    found = unit_activity(tensor, tensor.relu())
    active = [[a[..., i].ravel() > 0] for i in range(units)]
    shares = np.array([np.mean(x) for x in active])
    assert fraction_active(found).item() == pytest.approx(np.count_nonzero(np.maximum(a, 0)) / a.size)  # Ma et al.
    assert dead_units(found).tolist() == [p < 0.01 for p in shares]  # Dohare et al.
    assert zombie_units(found).tolist() == [p > 0.99 for p in shares]
    assert found.norm.item() == pytest.approx(sum(math.sqrt(float(np.sum(x**2))) for x in a))
    for tau in (0.025, 0.1):  # Sokar et al.: eq. 1
        means = [np.abs(np.maximum(a[..., i], 0)).mean() for i in range(units)]
        layer_mean = sum(means) / units
        expected = [m <= tau * layer_mean for m in means]
        assert dormant_units(found, tau).tolist() == expected
        assert share_of(dormant_units(found, tau), found).item() == pytest.approx(np.mean(expected))


@given(seed=seeds, cut=st.integers(1, 49))
def test_batches_add_up(seed, cut) -> None:
    a, _ = layer(seed, 50, 4)
    whole, parts = unit_activity(a, a.relu()), (unit_activity(x, x.relu()) for x in (a[:cut], a[cut:]))
    first, second = parts
    for joined, expected in zip(first.plus(second), whole):
        assert torch.allclose(joined, expected)


def test_pooling_counts_wide_layers_more() -> None:
    """sum_l #(h_l > 0) / sum_l numel(h_l), as in the code of Ma et al., and not the mean over layers."""
    wide, narrow = torch.ones(2, 30), -torch.ones(2, 10)
    layers = [unit_activity(x, x.relu()) for x in (wide, narrow)]
    assert fraction_active(*layers).item() == 0.75


def test_a_layer_without_any_activity_is_dormant_as_a_whole() -> None:
    a = -torch.ones(4, 3)
    assert dormant_units(unit_activity(a, a.relu()), 0.025).all()


def test_dormancy_does_not_see_a_layer_that_shrinks() -> None:
    a, _ = layer(0, 64, 16)
    small = unit_activity(a * 1e-3, (a * 1e-3).relu())
    assert dormant_units(small, 0.1).equal(dormant_units(unit_activity(a, a.relu()), 0.1))


def test_nan_is_neither_active_nor_dead() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, math.nan]])
    found = unit_activity(a, a.relu())
    assert found.active.isnan().tolist() == [False, True]
    assert fraction_active(found).isnan() and share_of(dead_units(found), found).isnan()
    assert share_of(dormant_units(found, 0.1), found).isnan()


SLOPES = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": F.softsign,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "relu": F.relu,
    "relu6": F.relu6,
}


def tails(function, **settings: float) -> tuple[float, float]:
    """Ends of the outermost stretches in which autograd's slope stays below 2 % of its maximum."""
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x, **settings).sum(), x)
    steep = torch.nonzero(slope.abs() >= FLAT * slope.abs().max()).flatten()
    low, high = x[steep[0]].item(), x[steep[-1]].item()
    return (-math.inf if low < -11.99 else low), (math.inf if high > 11.99 else high)


@pytest.mark.parametrize("name", SLOPES)
def test_a_smooth_unit_is_active_outside_of_flat_tails(name: str) -> None:
    assert active_range(name) == pytest.approx(tails(SLOPES[name]), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("elu", {"alpha": 0.5}), ("elu", {"alpha": 2.0}), ("celu", {"alpha": 2.0}), ("softplus", {"beta": 3.0})],
)
def test_settings_move_the_tails(name: str, settings: dict[str, float]) -> None:
    assert active_range(name, **settings) == pytest.approx(tails(getattr(F, name), **settings), abs=2e-4)


def test_tails_of_tanh_are_those_of_published_code() -> None:
    """|tanh a| > 0.99 is saturated in published code; sigmoid below 0.01 or above 0.99."""
    assert math.tanh(active_range("tanh")[1]) == pytest.approx(0.99, abs=1e-3)
    assert 1 / (1 + math.exp(active_range("sigmoid")[1])) == pytest.approx(0.005, abs=1e-4)


def test_an_activation_that_is_not_known_is_told() -> None:
    with pytest.raises(ValueError, match=r"'silue'\. Did you mean 'silu'"):
        active_range("silue")


@given(seed=seeds, d=st.integers(1, 12), more=st.integers(0, 20), power=st.floats(0, 4))
def test_ranks(seed, d, more, power) -> None:
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((d + more, d)) * np.arange(1, d + 1) ** -power + 0.3
    s = np.linalg.svd(h, compute_uv=False)  # not by the matrix of inner products
    found = singular_values(torch.from_numpy(h))
    assert found.numpy() == pytest.approx(s, rel=1e-6, abs=1e-6 * s[0])
    k = next(k for k in range(1, d + 1) if s[:k].sum() >= 0.99 * s.sum() - 1e-9)  # Kumar et al.: the least k
    assert srank(found).item() == k
    p = s[s > 0] / s.sum()
    assert effective_rank(found).item() == pytest.approx(math.exp(-sum(p * np.log(p))), rel=1e-5)
    spectrum = np.linalg.svd(h / np.sqrt(len(h)), compute_uv=False)  # Lyle et al.
    assert feature_rank(found, len(h)).item() == np.count_nonzero(spectrum > 0.01)


def test_only_the_feature_rank_sees_features_go_to_zero() -> None:
    h = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 8)))
    large, small = singular_values(h), singular_values(1e-4 * h)
    assert srank(large) == srank(small) and effective_rank(large).item() == pytest.approx(
        effective_rank(small).item()
    )
    assert feature_rank(large, 64) == 8 and feature_rank(small, 64) == 0


def test_srank_is_not_the_stable_rank() -> None:
    s = torch.tensor([10.0, 1.0, 1.0, 1.0])
    assert srank(s) == 4 and (s.square().sum() / s[0] ** 2).item() == pytest.approx(1.03)


def test_no_rank_of_fewer_states_than_features() -> None:
    with pytest.raises(ValueError, match=r"as many states as features.*\(3, 4\)"):
        singular_values(torch.ones(3, 4))


def test_ranks_of_nothing_and_of_nan() -> None:
    nothing, broken = singular_values(torch.zeros(4, 2)), singular_values(torch.full((4, 2), math.nan))
    assert [f(nothing).item() for f in (srank, effective_rank)] == [0.0, 0.0] and feature_rank(nothing, 4) == 0
    assert all(f(broken).isnan() for f in (srank, effective_rank)) and feature_rank(broken, 4).isnan()


@given(seed=seeds, n=st.integers(1, 40), actions=st.integers(2, 5))
def test_churn(seed, n, actions) -> None:
    rng = np.random.default_rng(seed)
    before, now = rng.standard_normal((2, n, actions))
    changed = [
        max(range(actions), key=b.__getitem__) != max(range(actions), key=c.__getitem__) for b, c in zip(before, now)
    ]
    assert greedy_churn(torch.from_numpy(before), torch.from_numpy(now)).item() == pytest.approx(sum(changed) / n)
    expected = np.abs(now - before).sum() / np.abs(before).sum()
    assert output_change(torch.from_numpy(before), torch.from_numpy(now)).item() == pytest.approx(expected)


def test_churn_of_nan_and_of_one_action() -> None:
    assert greedy_churn(torch.ones(2, 2), torch.tensor([[math.nan, 1.0], [1.0, 1.0]])).isnan()
    with pytest.raises(ValueError, match="two actions at least"):
        greedy_churn(torch.ones(2, 1), torch.ones(2, 1))


@given(seed=seeds, members=st.integers(2, 5), n=st.integers(1, 20))
def test_gap_of_members(seed, members, n) -> None:
    q = np.random.default_rng(seed).standard_normal((members, n))
    pairs = [max(abs(q[i, s] - q[j, s]) for i in range(members) for j in range(members)) for s in range(n)]
    assert member_gap(torch.from_numpy(q)).item() == pytest.approx(sum(pairs) / n)


@given(seed=seeds, n=st.integers(3, 60), level=st.sampled_from([0.0, 1e3]))
def test_explained_variance_as_on_policy_code_has_it(seed, n, level) -> None:
    rng = np.random.default_rng(seed)
    values, returns = rng.standard_normal((2, n)) + level
    found = explained_variance(torch.from_numpy(values), torch.from_numpy(returns))
    assert (1 - found.residual / found.total).item() == pytest.approx(1 - np.var(returns - values) / np.var(returns))


def test_explained_variance_of_a_constant_is_zero_and_of_equal_returns_unknown() -> None:
    constant = explained_variance(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    assert constant.residual == constant.total
    assert explained_variance(torch.ones(3), torch.ones(3)).total == 0


@given(seed=seeds, units=st.integers(1, 30))
def test_overlap(seed, units) -> None:
    a, b = np.random.default_rng(seed).random((2, units)) < 0.4
    x, y = {i for i in range(units) if a[i]}, {i for i in range(units) if b[i]}
    found = overlap(torch.from_numpy(a), torch.from_numpy(b))
    assert (found.common, found.smaller) == (len(x & y), min(len(x), len(y)))
