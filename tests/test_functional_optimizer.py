"""RMS_t, samples and checksums against arithmetic written another way."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from traindiag.functional.checksum import checksums
from traindiag.functional.optimizer import (
    bias_correction,
    rms_t,
    rms_t_ceiling,
    rms_t_squares,
    segment_squares,
    stride_of,
    strided,
)

SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=4)


@given(SHAPES, st.integers(1, 60), st.permutations(range(4)))
def test_a_sample_is_the_same_scalars_whatever_the_memory_layout(
    shape: list[int], limit: int, order: list[int]
) -> None:
    plain = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    axes = [axis for axis in order if axis < len(shape)]
    back = [axes.index(axis) for axis in range(len(axes))]
    turned = plain.permute(axes).contiguous().permute(back)  # same numbers, other strides
    expected = plain.flatten()[:: stride_of(plain.numel(), limit)]
    assert strided(plain, limit).equal(expected) and strided(turned, limit).equal(expected)
    assert len(expected) <= limit


@given(st.integers(1, 10**7), st.integers(1, 10**7))
def test_a_sample_meets_every_column(rows: int, columns: int) -> None:
    stride = stride_of(rows * columns)
    assert math.gcd(stride, columns) == 1
    assert -(-rows * columns // stride) <= 4096


def test_a_slice_of_a_larger_tensor_is_sampled_in_its_own_place() -> None:
    whole = torch.arange(40.0)
    part = whole[10:40].reshape(5, 6)
    assert strided(part, 8).tolist() == [10.0 + i for i in range(0, 30, stride_of(30, 8))]


def test_complex_numbers_are_pairs() -> None:
    assert strided(torch.tensor([1 + 2j, 3 - 4j])).tolist() == [1, 2, 3, -4]


@pytest.mark.parametrize("shape", [(50_000, 64), (512, 2048), (768, 3, 16, 16)])
def test_the_root_mean_square_of_a_sample_is_close(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(shape[0], generator=generator).reshape(-1, *[1] * (len(shape) - 1))  # rows differ
    values = torch.randn(shape, generator=generator) * scale
    sampled, true = strided(values).double().square().mean().sqrt(), values.double().square().mean().sqrt()
    assert abs(sampled / true - 1) < 0.05


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=5), min_size=1, max_size=5))
def test_segment_squares(parts: list[list[float]]) -> None:
    flat = torch.tensor([x for part in parts for x in part])
    found = segment_squares(flat, [len(p) for p in parts])
    expected = [sum(x * x for x in part) for part in parts]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-30)


def by_hand(gradient: list[float], moment: list[float], eps: float, correction: float) -> float:
    total = 0.0
    for g, v in zip(gradient, moment):
        denominator = max(v / correction, eps**2)
        total += g * g / denominator if denominator else 0.0
    return math.sqrt(total / len(gradient))


POSITIVE = st.floats(2**-20, 2**20, width=32)


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), POSITIVE | st.just(0.0)), min_size=1, max_size=8),
    st.sampled_from([1e-8, 1e-6, 1e-3]),
    st.floats(1e-3, 1.0),
)
def test_rms_t_is_its_formula(pairs: list[tuple[float, float]], eps: float, correction: float) -> None:
    assume(all(abs(g) > 1e-9 or g == 0 for g, _ in pairs))
    gradient, moment = [g for g, _ in pairs], [v for _, v in pairs]
    found = rms_t(torch.tensor(gradient), torch.tensor(moment), eps=eps, correction=correction)
    assert math.isclose(float(found), by_hand(gradient, moment, eps, correction), rel_tol=1e-4, abs_tol=1e-12)


def test_one_number_and_a_column_of_the_same_number_agree() -> None:
    gradient, moment = torch.randn(7), torch.rand(7)
    scalar = rms_t_squares(gradient, moment, [3, 4], eps=0.5, correction=0.2)
    column = {"eps": torch.full((2,), 0.5), "correction": torch.full((2,), 0.2)}
    torch.testing.assert_close(rms_t_squares(gradient, moment, [3, 4], **column).double(), scalar, rtol=1e-6, atol=0)
    other = rms_t_squares(gradient, moment, [3, 4], eps=torch.tensor([0.5, 9.0]), correction=torch.tensor([0.2, 1.0]))
    torch.testing.assert_close(other[0].double(), scalar[0], rtol=1e-6, atol=0)
    assert other[1] < scalar[1]


def test_a_scalar_that_never_had_a_gradient_counts_as_zero() -> None:
    found = rms_t(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 9.0]), eps=0.0)
    assert float(found) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(bad: float) -> None:
    found = rms_t_squares(torch.tensor([bad, 1.0]), torch.ones(2), [1, 1], eps=1e-8)
    assert not math.isfinite(found[0]) and found[1] == 1
    assert math.isnan(rms_t(torch.ones(1), torch.tensor([math.nan]), eps=1e-8))


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99, 0.999])
def test_the_ceiling_is_reached_by_a_gradient_out_of_nothing_and_never_passed(beta2: float) -> None:
    moment, quiet = 0.0, 1e-12
    for _ in range(20_000):
        moment = beta2 * moment + (1 - beta2) * quiet**2
    moment = beta2 * moment + (1 - beta2)
    found = float(rms_t(torch.ones(1), torch.tensor([moment]), eps=1e-15))
    assert found == pytest.approx(rms_t_ceiling(beta2), rel=1e-5)


@pytest.mark.parametrize("beta2", [1.0, -0.1, 2])
def test_the_ceiling_needs_a_decay(beta2: float) -> None:
    with pytest.raises(ValueError, match=f"got {beta2}"):
        rms_t_ceiling(beta2)


@given(st.sampled_from(["0.9", "0.95", "0.999", "0.9999999"]), st.integers(1, 10_000))
def test_bias_correction_does_not_cancel(beta2: str, step: int) -> None:
    getcontext().prec = 50
    expected = float(1 - Decimal(float(beta2)) ** step)
    on_host = bias_correction(float(beta2), step)
    on_device = bias_correction(torch.tensor(float(beta2), dtype=torch.float64), torch.tensor(float(step)))
    assert isinstance(on_device, Tensor)
    np.testing.assert_allclose([on_host, on_device], expected, rtol=1e-9)


def test_bias_correction_without_memory() -> None:
    assert bias_correction(0.0, 3) == 1


BITS = st.integers(0, 2**32 - 1)


def checksum(bits: list[int]) -> float:
    flat = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    return float(checksums(flat, torch.zeros(len(bits), dtype=torch.int64), torch.arange(len(bits)), 1))


@given(st.lists(BITS, min_size=1, max_size=50), st.data())
def test_any_changed_bit_changes_the_checksum(bits: list[int], data: st.DataObject) -> None:
    at, flip = data.draw(st.integers(0, len(bits) - 1)), data.draw(st.integers(0, 31))
    changed = list(bits)
    changed[at] ^= 1 << flip
    before, after = checksum(bits), checksum(changed)
    assert before == checksum(list(bits)) and before != after
    assert before == int(before) and 0 <= before < 2**24  # exact in float32


def test_swapped_scalars_change_the_checksum() -> None:
    one, two = 0x3F800000, 0x40000000
    assert checksum([one, two]) != checksum([two, one])


def test_checksums_of_several_parts_do_not_mix() -> None:
    flat, owner, place = torch.randn(6), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2] * 2)
    first = checksums(flat, owner, place, 2)
    second = checksums(torch.cat([flat[:3], -flat[3:]]), owner, place, 2)
    assert first[0] == second[0] and first[1] != second[1]
