"""Integer keys sort as floats do, with NaN above everything, and survive the trip bit for bit."""

import struct

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from traindiag.transfer.keys import UNSEEN, decode, encode

FLOATS = st.floats(width=32, allow_nan=False)


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


@given(FLOATS, FLOATS)
def test_order_is_that_of_the_floats(a: float, b: float) -> None:
    key_a, key_b = encode(torch.tensor([a, b]), rank=0).tolist()
    if a < b:
        assert key_a < key_b
    elif a > b:
        assert key_a > key_b


@given(FLOATS, st.integers(0, 2**20))
def test_value_and_rank_come_back(value: float, rank: int) -> None:
    values, ranks = decode(encode(torch.tensor([value]), rank).numpy())
    assert bits(values[0]) == bits(value)
    assert ranks[0] == rank


@given(FLOATS)
def test_nan_wins_over_any_number(value: float) -> None:
    nan_key, key = encode(torch.tensor([float("nan"), value]), rank=3).tolist()
    assert nan_key > key
    values, ranks = decode(np.array([nan_key]))
    assert np.isnan(values[0]) and ranks[0] == 3


def test_every_nan_is_one_nan() -> None:
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert negative_nan.isnan()
    assert encode(negative_nan, 0).equal(encode(torch.tensor([float("nan")]), 0))


def test_unseen_loses_to_minus_infinity_and_is_no_nan_of_a_rank() -> None:
    assert encode(torch.tensor([float("-inf")]), rank=0).item() > UNSEEN
    values, ranks = decode(np.array([UNSEEN]))
    assert np.isnan(values[0]) and ranks[0] == -1


def test_lowest_rank_wins_a_tie() -> None:
    first, second = encode(torch.tensor([2.0]), 0), encode(torch.tensor([2.0]), 1)
    assert decode(torch.maximum(first, second).numpy())[1].tolist() == [0]
