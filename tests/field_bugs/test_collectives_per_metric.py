"""One all-reduce per metric: a sample of a large model costs thousands of collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.ranks import run_on_ranks
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.schedule import EARLY

COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
]
STEPS, CADENCE = 12, 4


def _count(rank: int, layers: int) -> list[tuple[int, int]]:
    """All-reduces and other collectives of each step."""
    counts = {"all_reduce": 0, "other": 0}
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts["all_reduce" if _name == "all_reduce" else "other"] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    model = gpt(layers=layers)
    optimizer = torch.optim.AdamW(model.parameters())
    diagnostics = Diagnostics(model, optimizer, every_n_steps=CADENCE, max_overhead=None, terminal=False)
    found = []
    for i in range(STEPS):
        counts.update(all_reduce=0, other=0)
        with diagnostics.step() as step:
            step.loss(loss_of(model, batch(i))).backward()
            step.gradients()
            diagnostics.log("user/number", float(i))
            optimizer.step()
        found.append((counts["all_reduce"], counts["other"]))
    diagnostics.finish()
    return found


@pytest.mark.parametrize("layers", [1, 4])
def test_one_a_step_and_two_more_where_the_slow_lane_speaks(layers: int) -> None:
    first, second = run_on_ranks(_count, layers)
    assert first == second
    assert first[0] == (3, 2)  # each lane agrees on its layout, once
    slow = {i for i in range(STEPS) if i % CADENCE == 0} | set(EARLY)
    assert first[1:] == [(3 if i in slow else 1, 0) for i in range(1, STEPS)]
