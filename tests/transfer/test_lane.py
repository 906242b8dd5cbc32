"""A lane against what one process would compute in float64 from the data of all ranks."""

import math

import numpy as np
import torch

from tests.ranks import run_on_ranks
from traindiag.record.cells import Cells
from traindiag.transfer.lane import Delivery, Lane
from traindiag.transfer.states import Group

CPU = torch.device("cpu")
M = ("monitor", "group")


def group(names: list[str], total: list[float], peak: list[float]) -> Group:
    cells = Cells.along("layer", names)
    return Group("g", cells, {"total": torch.tensor(total)}, {"peak": torch.tensor(peak)})


def by_cell(delivery: Delivery) -> dict[str, tuple[float, float, int]]:
    reduced = delivery.states[M]
    return {
        str(c[0]): (float(reduced.sums["total"][i]), float(reduced.maxima["peak"][i]), int(reduced.ranks["peak"][i]))
        for i, c in enumerate(reduced.cells.coordinates)
        if reduced.seen[i]
    }


def test_one_process_gets_back_what_it_sent() -> None:
    lane = Lane(CPU, ["cost"])
    lane.send(7, {M: group(["a", "b"], [1.5, math.nan], [-2.0, math.nan])}, {"cost": 0.25})
    delivery = lane.receive()
    assert delivery is not None and delivery.step == 7 and delivery.header["cost"] == 0.25
    got = by_cell(delivery)
    assert got["a"] == (1.5, -2.0, 0)
    assert math.isnan(got["b"][0]) and math.isnan(got["b"][1]) and got["b"][2] == 0
    assert lane.receive() is None


def test_absent_is_not_nan() -> None:
    lane = Lane(CPU)
    lane.send(0, {M: group(["a", "b"], [1, 2], [1, 2])}, {})
    lane.receive()
    lane.send(1, {M: group(["b"], [math.nan], [math.nan])}, {})
    delivery = lane.receive()
    assert delivery is not None
    assert delivery.states[M].seen.tolist() == [False, True]


def test_a_new_cell_is_not_lost() -> None:
    lane = Lane(CPU)
    lane.send(0, {M: group(["a"], [1], [1])}, {})
    lane.receive()
    lane.send(1, {M: group(["a", "new"], [2, 3], [2, 3])}, {})
    delivery = lane.receive()
    assert delivery is not None
    assert by_cell(delivery) == {"a": (2, 2, 0), "new": (3, 3, 0)}


def test_counts_beyond_float32_stay_exact() -> None:
    lane = Lane(CPU)
    cells = Cells.single()
    count = torch.tensor([2.0**24 + 1], dtype=torch.float64)
    lane.send(0, {M: Group("g", cells, {"count": count})}, {})
    delivery = lane.receive()
    assert delivery is not None and delivery.states[M].sums["count"][0] == 2**24 + 1


def _exchange(
    rank: int, steps: list[list[tuple[list[str], list[float]]]]
) -> list[dict[str, tuple[float, float, int]]]:
    lane = Lane(CPU)
    results = []
    for step, per_rank in enumerate(steps):
        names, values = per_rank[rank]
        lane.send(step, {M: group(names, values, values)} if names else {}, {})
        delivery = lane.receive()
        assert delivery is not None and delivery.step == step
        results.append(by_cell(delivery) if M in delivery.states else {})
    return results


def test_two_ranks_agree_with_one_process_in_float64() -> None:
    nan, inf = math.nan, math.inf
    steps = [
        [(["a", "b"], [1.25, -3.0]), (["a", "b"], [2.5, -1e30])],
        [(["a", "b"], [nan, 1.0]), (["a", "b"], [5.0, -inf])],  # NaN on the first rank
        [(["a", "b"], [5.0, 1.0]), (["a", "b"], [nan, inf])],  # NaN on the second
        [(["a"], [1.0]), (["a", "b", "only1"], [2.0, 3.0, 4.0])],  # a cell that one rank has
        [([], []), (["only1"], [9.0])],  # a rank with nothing at all
    ]
    first, second = run_on_ranks(_exchange, steps)
    for got, other, per_rank in zip(first, second, steps):
        np.testing.assert_equal(got, other)
        expected: dict[str, list[tuple[float, int]]] = {}
        for rank, (names, values) in enumerate(per_rank):
            for name, value in zip(names, values):
                expected.setdefault(name, []).append((value, rank))
        assert got.keys() == expected.keys()
        for name, entries in expected.items():
            values64 = np.array([np.float32(v) for v, _ in entries], dtype=np.float64)
            total, peak, rank = got[name]
            np.testing.assert_allclose(total, values64.sum(), rtol=1e-12)
            np.testing.assert_equal(np.float32(peak), np.float32(values64.max()))  # numpy's max keeps NaN
            worst = next((r for v, r in entries if math.isnan(v)), None)
            if worst is None:
                worst = next(r for v, r in entries if np.float32(v) == np.float32(peak))
            assert rank == worst


def _header(rank: int) -> dict[str, float]:
    lane = Lane(CPU, ["fault"])
    lane.send(0, {}, {"fault": float(rank)})
    delivery = lane.receive()
    assert delivery is not None
    return dict(delivery.header)


def test_header_tells_all_ranks_of_a_fault_on_one() -> None:
    assert run_on_ranks(_header) == [{"held_back": 0, "fault": 1}] * 2
