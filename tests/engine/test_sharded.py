"""Gradient norms of sharded models on two ranks are those of one process, or are said to be unseen."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.lightning_runs.test_cleanup import leftovers
from tests.ranks import run_on_ranks
from traindiag.demo.model import Block
from traindiag.engine.diagnostics import Diagnostics

STEPS = 3
KINDS = ["fsdp2", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "original FULL_SHARD", "original NO_SHARD"]


def sharded(kind: str) -> nn.Module:
    model = gpt(width=18, heads=2)  # sizes that two ranks cannot share evenly
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    return FullyShardedDataParallel(
        model,
        use_orig_params=kind.startswith("original"),
        sharding_strategy=ShardingStrategy[kind.split()[-1]],
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
    )


def trained(model: nn.Module, batches: list[list[int]], attach: bool = False) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings: dict[str, Any] = {"every_n_steps": 1, "max_overhead": None, "exact": True, "terminal": False}
        diagnostics = (Diagnostics.attach if attach else Diagnostics)(model, optimizer, **settings)

        def one(step: Any, items: list[int]) -> None:
            losses = [loss_of(model, batch(i)) for i in items]
            loss = torch.stack(losses).mean()
            if step is not None:
                step.loss(loss)
            loss.backward()
            if step is not None:
                step.gradients()
            optimizer.step()
            optimizer.zero_grad()

        for items in batches:
            if attach:
                one(None, items)
            else:
                with diagnostics.step() as step:
                    one(step, items)
        diagnostics.finish()
    return {
        "history": {n: (s.steps.tolist(), s.cells.coordinates, s.values) for n, s in diagnostics.history.items()},
        "told": [str(w.message) for w in caught if "traindiag" in str(w.message)],
        "coverage": diagnostics.coverage,
        "left": leftovers(model, optimizer),
    }


def _on_ranks(rank: int) -> dict[tuple[str, bool], dict[str, Any]]:
    warnings.simplefilter("ignore")
    batches = [[2 * step + rank] for step in range(STEPS)]
    return {(kind, attach): trained(sharded(kind), batches, attach) for kind in KINDS for attach in (False, True)}


@pytest.fixture(scope="module")
def on_ranks() -> tuple[Any, Any]:
    first, second = run_on_ranks(_on_ranks)
    return first, second


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained(gpt(width=18, heads=2), [[2 * step, 2 * step + 1] for step in range(STEPS)])


@pytest.mark.parametrize("attach", [False, True], ids=["step", "attach"])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_one_process(kind: str, attach: bool, on_ranks: Any, alone: dict[str, Any]) -> None:
    first, second = (r[kind, attach] for r in on_ranks)
    name = "gradient/norm_applied" if attach else "gradient/norm"
    if kind.startswith("original"):
        for result in (first, second):
            assert name not in result["history"]  # rather nothing than something wrong
            assert result["told"] and all("use_orig_params=True" in text for text in result["told"])
            rows = [c for c in result["coverage"] if c.family == "gradient"]
            assert [c.sight for c in rows] == ["unseen"] and "use_orig_params=True" in rows[0].reason
    else:
        for result in (first, second):
            assert not result["told"]
            np.testing.assert_allclose(result["history"][name][2], alone["history"]["gradient/norm"][2], rtol=1e-5)
    truth = alone["history"]["attention/max_logit"]
    for result in (first, second):
        np.testing.assert_allclose(result["history"]["attention/max_logit"][2], truth[2], rtol=1e-5)
        assert result["history"]["attention/max_logit"][1] == truth[1]
        assert result["left"]["function modes"] == result["left"]["global hooks"] == 0
        assert result["left"]["optimizer hooks"] == 0


def test_every_parameter_of_fully_shard_and_every_flat_parameter(on_ranks: Any, alone: dict[str, Any]) -> None:
    _, coordinates, truth = alone["history"]["gradient/parameter_norm"]
    of = dict(zip((c[1] for c in coordinates), truth.T))
    _, coordinates, found = on_ranks[0]["fsdp2", False]["history"]["gradient/parameter_norm"]
    assert {c[1] for c in coordinates} == of.keys()
    for i, (_, name) in enumerate(coordinates):
        np.testing.assert_allclose(found[:, i], of[name], rtol=1e-5, err_msg=str(name))
    _, coordinates, found = on_ranks[1]["FULL_SHARD", False]["history"]["gradient/parameter_norm"]
    for i, (_, name) in enumerate(coordinates):
        block = str(name).rpartition("._flat_param")[0]
        inside = [v for n, v in of.items() if (n.startswith(block) if block else not n.startswith("blocks"))]
        np.testing.assert_allclose(found[:, i], np.sqrt(np.square(inside).sum(0)), rtol=1e-5, err_msg=str(name))
