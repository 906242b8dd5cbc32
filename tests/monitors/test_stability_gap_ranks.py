"""Two gloo ranks: each evaluates a share, both turn at the same step, and a sharded model is called by both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.monitors.test_stability_gap import INPUTS, loss, target
from tests.ranks import run_on_ranks
from traindiag import Diagnostics, StabilityGap


def train(rank: int, sharded: bool, mark_on: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    model: Any
    if sharded:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        model = fully_shard(inner, mesh=mesh)
    else:
        model = DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    calls = 0

    def counted(given: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss(given, batch)

    batches = [(INPUTS[i : i + 32], target(INPUTS[i : i + 32])) for i in range(0, 96, 32)]  # three, on two ranks
    monitor = StabilityGap({"old": batches}, counted, higher_is_better=False, every=20, gradients=loss)
    diagnostics = Diagnostics(
        model, optimizer, monitors=[monitor], default_monitors=False, terminal=False, strict=True, max_overhead=None
    )
    generator = torch.Generator().manual_seed(rank)
    for i in range(110):
        if i == 80 and mark_on == rank:  # only one of them says so
            monitor.mark_shift("sign")
        with diagnostics.step() as step:
            inputs = torch.randn(32, 4, generator=generator)
            found = nn.functional.mse_loss(model(inputs), target(inputs, 1.0 if i < 80 else -1.0))
            step.loss(found).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    history = {n: (s.steps.tolist(), s.cells.labels, s.values.copy()) for n, s in diagnostics.history.items()}
    whole = None
    if not sharded:
        with torch.no_grad():
            total, count = loss(inner, (INPUTS, target(INPUTS)))
        whole = float(total / count)
    alerts = [(a.step, a.status, a.severity, a.diagnosis, a.evidence) for a in diagnostics.alerts]
    return {"history": history, "alerts": alerts, "calls": calls, "whole": whole, "due": diagnostics.step_count}


def same(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = results
    assert first["alerts"] == second["alerts"] != []
    assert first["history"].keys() == second["history"].keys()
    for name, (steps, labels, values) in first["history"].items():
        assert second["history"][name][:2] == (steps, labels)
        np.testing.assert_array_equal(values, second["history"][name][2])
    assert first["calls"] == second["calls"]  # a collective inside of the model would hang otherwise
    return first


def test_each_rank_evaluates_a_share_and_both_turn_where_one_marks() -> None:
    found = same(run_on_ranks(train, False, 1))
    steps, labels, _ = found["history"]["stability/shift"]
    assert steps == [80] and "sign" in labels
    evaluated, _, values = found["history"]["stability/loss"]
    assert evaluated == [0, 20, 40, 60, 80, *range(81, 110)]
    np.testing.assert_allclose(values[-1, 0], found["whole"], rtol=1e-6)
    assert found["calls"] == 2 * 35  # the start and 34 more, of two batches a rank: one of the four is spare
    assert found["history"]["stability/gradient_cosine"][0] == [80, 82, 85, 100]


def test_sharded_models_are_evaluated_by_all_ranks_together() -> None:
    found = same(run_on_ranks(train, True, 0))
    assert found["history"]["stability/shift"][0] == [80]
    assert len(found["history"]["stability/loss"][0]) == 34
    assert "stability/gradient_cosine" not in found["history"]
