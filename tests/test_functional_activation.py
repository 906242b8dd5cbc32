"""Activation statistics against plain fp64 numpy: nothing that is broken is lost, whatever the shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from traindiag.functional import activation
from traindiag.functional.activation import ActivationStatistics, activation_statistics

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kurtosis(rows: np.ndarray) -> float:
    """As the paper writes it, of ``[rows, features]``: mean square of the features' mean squares over their mean."""
    mean_squares = np.array([np.mean(rows[:, j] ** 2) for j in range(rows.shape[1])])
    return float(np.mean(mean_squares**2) / np.mean(mean_squares) ** 2)


def joined(parts: list[ActivationStatistics]) -> ActivationStatistics:
    sums = {n: torch.stack([getattr(p, n) for p in parts]).sum() for n in ActivationStatistics._fields}
    return ActivationStatistics(**sums | {"max_abs": torch.stack([p.max_abs for p in parts]).amax()})


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    backwards=st.booleans(),
)
def test_every_row_against_fp64(seed, shape, dtype, size, zeros, backwards) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(size * rng.standard_normal(shape) * (rng.random(shape) >= zeros)).to(dtype)
    if backwards:
        x = x.permute(*range(x.ndim)[::-1])  # not contiguous
    truth = x.double().numpy()
    found = activation_statistics(x, rows=10**6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {s.dtype for s in found} == {wide} and all(s.ndim == 0 for s in found)
    assert found.values == found.sampled == truth.size
    assert found.zeros == np.count_nonzero(truth == 0)
    assert found.nonfinite == 0
    assert found.max_abs == (np.abs(truth).max() if truth.size else -math.inf)
    power = float(np.sum(truth**2))
    for state in (found.square_sum, found.sampled_square_sum):
        assert state.item() == pytest.approx(power, rel=1e-5)
    if power:
        expected = kurtosis(truth.reshape(-1, truth.shape[-1]))
        assert (found.weighted_kurtosis / found.sampled_square_sum).item() == pytest.approx(expected, rel=1e-4)
        assert 1 - 1e-4 <= expected <= truth.shape[-1] + 1e-4
    else:
        assert found.weighted_kurtosis == 0


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 30), min_size=2, max_size=4),  # fewer values than are looked at one by one
    rows=st.integers(1, 12),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    number=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_one_broken_value_anywhere_is_told(seed, shape, rows, bad, number, dtype) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    at = rng.choice(x.numel(), min(number, x.numel()), replace=False)
    x.view(-1)[torch.from_numpy(at)] = bad
    found = activation_statistics(x, rows=rows)
    assert 1 <= found.nonfinite <= len(at)
    assert not found.max_abs.isfinite() and not found.square_sum.isfinite()
    assert found.max_abs.isnan() == math.isnan(bad)
    everything = activation_statistics(x, rows=10**6)
    assert everything.nonfinite == len(at)
    assert everything.zeros == np.count_nonzero(x.double().numpy() == 0)
    assert everything.weighted_kurtosis.isnan()


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows=st.integers(1, 50),
)
def test_rows_are_evenly_spaced_and_few(seed, shape, rows) -> None:
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(*shape, 1)
    sample = activation._evenly(x, rows)
    kept = sample.flatten().int().tolist()
    assert 1 <= len(kept) <= rows
    assert len(set(kept)) == len(kept)
    assert sample.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a view, no copy"
    assert len(kept) == math.prod(shape) or len(kept) > rows / 2 / 2 ** len(shape)
    for d, n in enumerate(shape):  # along each dimension the same step, from the middle of the first to the last
        places = sorted({np.unravel_index(i, shape)[d] for i in kept})
        steps = set(np.diff(places).tolist())
        assert len(steps) <= 1
        if steps:
            step = steps.pop()
            assert places[0] == step // 2 and n - places[-1] <= step
    found = activation_statistics(x, rows=rows)
    assert found.sampled == len(kept)
    assert found.values == x.numel() and found.max_abs == x.numel() - 1


def test_wide_activations_are_sampled_more_sparsely() -> None:
    found = activation_statistics(torch.ones(4, 100, 2**14))
    assert found.sampled <= 2**20
    assert found.values == 4 * 100 * 2**14


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.1, 1.0, 30.0])), min_size=1, max_size=4),
)
def test_joined_kurtosis_is_never_below_that_of_all_together(seed, sizes) -> None:
    rng = np.random.default_rng(seed)
    parts = [gain * rng.standard_normal((rows, 5)) for rows, gain in sizes]
    found = joined([activation_statistics(torch.from_numpy(p)) for p in parts])
    together = kurtosis(np.concatenate(parts))
    reported = (found.weighted_kurtosis / found.sampled_square_sum).item()
    assert reported >= together * (1 - 1e-9)
    weights = np.array([np.sum(p**2) for p in parts])
    assert reported == pytest.approx(np.average([kurtosis(p) for p in parts], weights=weights), rel=1e-9)


def test_joined_kurtosis_is_exact_where_the_same_features_are_large() -> None:
    outliers = torch.tensor([1.0, 1.0, 20.0, 1.0])
    parts = [gain * outliers.expand(8, 4) for gain in (1.0, 0.3, 7.0)]
    found = joined([activation_statistics(p) for p in parts])
    expected = kurtosis(torch.cat(parts).double().numpy())
    assert (found.weighted_kurtosis / found.sampled_square_sum).item() == pytest.approx(expected, rel=1e-5)


def test_one_feature_carries_everything() -> None:
    x = torch.zeros(3, 4, 64)
    x[..., 17] = 1e15  # its fourth power would overflow
    found = activation_statistics(x)
    assert (found.weighted_kurtosis / found.sampled_square_sum).item() == pytest.approx(64)
    assert (found.zeros / found.sampled).item() == pytest.approx(63 / 64)


def test_half_precision_does_not_overflow_and_autocast_does_not_reach_in() -> None:
    x = torch.full((4, 8), 60000.0)
    for given_x in (x.half(), x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            found = activation_statistics(given_x)
        assert (found.square_sum / found.values).sqrt().item() == pytest.approx(given_x[0, 0].item(), rel=1e-6)
        assert (found.weighted_kurtosis / found.sampled_square_sum).item() == pytest.approx(1, rel=1e-6)


def test_no_graph_no_change_no_random_number() -> None:
    x = torch.randn(4, 6, 8, requires_grad=True) * 2
    before, state = x.detach().clone(), torch.get_rng_state()
    found = activation_statistics(x, rows=3)
    assert all(not s.requires_grad for s in found)
    assert all(s.untyped_storage().nbytes() <= 8 for s in found), "no view of the activation is kept"
    assert torch.equal(x.detach(), before) and torch.equal(state, torch.get_rng_state())


def test_traceable() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(activation_statistics, backend="aot_eager", fullgraph=True)
    for x in (torch.randn(4, 33, 8), torch.full((2, 3, 8), math.nan), torch.zeros(2, 3, 8)):
        for mine, plain in zip(compiled(x, rows=7), activation_statistics(x, rows=7), strict=True):
            torch.testing.assert_close(mine, plain, equal_nan=True)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.long)], ids=["0-d", "integers"])
def test_wrong_input_is_told(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \[\.\.\., features\] in floating point, got \("):
        activation_statistics(x)


def test_wrong_rows_are_told() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        activation_statistics(torch.ones(2, 2), rows=0)
