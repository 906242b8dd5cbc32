"""Two gloo ranks: one optimizer, whoever holds its tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.monitors.test_optimizer import diagnose
from tests.ranks import run_on_ranks

STEPS = 4
SIGNALS = ("rms_t", "update_rms", "update_ratio", "grad_rms_over_eps", "parameter_norm", "sentinel_rms_t", "skipped")


class Net(nn.Module):
    """A matrix that two ranks share unevenly, one that they halve, and one with a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 101)
        self.second = nn.Linear(101, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.second(self.first(x).relu()).relu())
        return out


def train(rank: int, kind: str, drift: int | None = None) -> dict[str, Any]:
    model: nn.Module = Net()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    for i in range(STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        if kind != "alone":
            x = x[rank::2]
        with diagnostics.step() as step:
            optimizer.zero_grad()
            step.loss((model(x) - 1).square().mean()).backward()
            step.gradients()
            optimizer.step()
            if drift == i and rank == 1:
                with torch.no_grad():
                    next(model.parameters())[3, 2] += 1e-6  # too small for any curve
    diagnostics.finish()
    history = diagnostics.history
    return {
        name: ([str(c.coordinates[-1]) for c in s.cells], s.steps.tolist(), s.values, s.seen)
        for name, s in history.items()
    } | {"coverage": [c.to_dict() for c in diagnostics.coverage]}


def assert_same(a: dict[str, Any], b: dict[str, Any], signals: tuple[str, ...], rtol: float) -> None:
    for signal in signals:
        names, steps, values, seen = a[signal]
        others, other_steps, other_values, other_seen = b[signal]
        assert (names, steps, seen.tolist()) == (others, other_steps, other_seen.tolist()), signal
        np.testing.assert_allclose(values, other_values, rtol=rtol, atol=1e-12, err_msg=signal)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_measure_what_one_process_measures(kind: str) -> None:
    first, second = run_on_ranks(train, kind)
    own = tuple(n for n in first if n.split("/")[0] in ("optimizer", "wiring", "gradient"))
    assert_same(first, second, own, rtol=0)  # bit for bit: the same verdict on both
    alone = train(0, "alone")
    signals = tuple(f"optimizer/{n}" for n in SIGNALS)
    # eight rows on one rank and four on each of two add up in another order; Adam's first steps amplify that
    assert_same(alone, first, (*signals, "gradient/rms"), rtol=2e-2)
    for flag in ("ungraded", "unchanged"):
        names, _, values, seen = first[f"wiring/{flag}"]
        assert seen.all() and (values == 0).all() and len(names) == 6
    assert (first["wiring/owners"][2] == 1).all()
    if kind == "fsdp":
        assert "wiring/replicas_differ" not in first
        assert any("wiring/replicas_differ" in c["places"] for c in first["coverage"])
    else:
        assert (first["wiring/replicas_differ"][2] == 0).all() and first["wiring/replicas_differ"][3].all()


def test_ranks_that_drift_apart_are_told_at_once() -> None:
    first, second = run_on_ranks(train, "ddp", 2)
    assert_same(first, second, ("wiring/replicas_differ",), rtol=0)
    names, steps, values, _ = first["wiring/replicas_differ"]
    differing = {name: [s for s, v in zip(steps, column) if v] for name, column in zip(names, values.T)}
    assert {name: at for name, at in differing.items() if at} == {"first.weight": [2, 3]}
