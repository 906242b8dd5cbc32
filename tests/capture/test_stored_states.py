"""Stored states: as they were, bounded, and one call again."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from traindiag.capture import stored_states
from traindiag.capture.stored_states import StoredStates, batch_size, finite

CPU = torch.device("cpu")


def call(start: int, rows: int) -> tuple[Any, ...]:
    x = torch.arange(start, start + rows).float()
    return ({"pixels": x[:, None].expand(rows, 3), "none": None}, [x, torch.tensor(7.0)], "mean")


def test_rows_are_kept_together_whatever_the_structure() -> None:
    states = StoredStates(10)
    states.take(call(0, 4), {"flag": True}, rows=4)
    states.take(call(4, 8), {"flag": True}, rows=4)  # every second one
    states.take(call(100, 4), {"flag": True}, rows=4)  # two are left to take
    args, kwargs = states.joined()
    expected = [0, 1, 2, 3, 4, 6, 8, 10, 100, 102]
    assert args[0]["pixels"][:, 0].tolist() == args[1][0].tolist() == expected
    assert args[0]["none"] is None and args[1][1] == 7.0 and args[2] == "mean" and kwargs == {"flag": True}
    assert states.full
    parts = [a[1][0].tolist() for a, _ in states.batches(4)]
    assert [x for part in parts for x in part] == expected and [len(p) for p in parts] == [4, 4, 2]


def test_what_is_kept_is_a_copy() -> None:
    x, states = torch.zeros(3, 2, requires_grad=True), StoredStates(3)
    states.take((x,), {}, rows=3)
    with torch.no_grad():
        x += 1
    (kept,) = states.joined()[0]
    assert not kept.any() and not kept.requires_grad


def test_calls_of_another_form_are_left_out() -> None:
    states = StoredStates(9)
    states.take((torch.zeros(3, 2),), {}, rows=3)
    for other in (torch.zeros(3, 4), torch.zeros(3, 2).long()):
        states.take((other,), {}, rows=3)
    states.take((torch.zeros(3, 2),), {"deterministic": True}, rows=3)
    assert len(states) == 3


def test_large_states_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_states, "MAX_BYTES", 100)
    states = StoredStates(1000)
    for _ in range(9):
        states.take((torch.zeros(2, 5),), {}, rows=2)  # 20 bytes each
    assert len(states) == 5 and states.full


def test_a_checkpoint_holds_plain_tensors() -> None:
    states, again = StoredStates(8), StoredStates(8)
    states.take(call(0, 4), {"x": torch.ones(4, 1)}, rows=4)
    file = io.BytesIO()
    torch.save(states.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True), CPU)
    for one in (states, again):
        one.take(call(9, 4), {"x": torch.zeros(4, 1)}, rows=4)
    (a, k), (b, j) = states.joined(), again.joined()
    assert torch.equal(a[0]["pixels"], b[0]["pixels"]) and torch.equal(k["x"], j["x"]) and a[2] == b[2]
    again.load_state_dict({}, CPU)
    assert len(again) == 0 and list(again.batches(4)) == []


def test_what_cannot_be_kept_is_told() -> None:
    with pytest.raises(TypeError, match=r"its inputs hold a object, which cannot be kept; pass probe="):
        StoredStates(4).take((torch.zeros(2, 2), object()), {}, rows=2)
    with pytest.raises(ValueError, match=r"expected a tensor \[states, \.\.\.\] among the inputs, got none"):
        StoredStates(4).take((1.0,), {}, rows=2)
    assert batch_size((torch.tensor(1.0), torch.zeros(3))) == 3


def test_finite() -> None:
    assert finite((torch.ones(2), torch.ones(2).long())) and not finite({"x": torch.tensor([1.0, math.nan])})
