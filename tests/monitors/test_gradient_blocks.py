"""Gradient norms of blocks against sums over the raw gradients in float64, grouped by hand."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.monitors.test_optimizer import diagnose
from tests.ranks import run_on_ranks
from traindiag.engine.diagnostics import Diagnostics

Named = tuple[str, nn.Parameter]


def by_hand(parameters: Iterable[Named]) -> dict[str, float]:
    """Norms in float64 from all gradients of a block end to end; no block has a bad value of another."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, p in parameters:
        if p.grad is not None:
            dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
            match = re.match(r"blocks\.\d+", name)
            parts[match[0] if match else name.split(".")[0]].append(dense.double().flatten())
    return {block: float(torch.cat(flat).square().sum().sqrt()) for block, flat in parts.items()}


def rows(diagnostics: Diagnostics, signal: str = "gradient/block_norm") -> list[dict[tuple[str, ...], float]]:
    """``{coordinates: value}`` of what is seen at each step."""
    series = diagnostics.history[signal]
    cells = [c.coordinates for c in series.cells]
    return [
        {c: float(v) for c, v, there in zip(cells, values, seen) if there}  # type: ignore[misc]
        for values, seen in zip(series.values, series.seen)
    ]


def test_every_step_and_whatever_is_clipped_later() -> None:
    model = gpt(layers=3)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    diagnostics, truth = diagnose(model, optimizer, every_n_steps=3), []
    for i in range(5):
        with diagnostics.step() as step:
            step.loss(loss_of(model, batch(i))).backward()
            truth.append(by_hand(named))
            step.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    assert diagnostics.history["gradient/block_norm"].steps.tolist() == list(range(5))
    outside = {"token_embedding", "position_embedding", "final_norm", "head"}
    for found, expected in zip(rows(diagnostics), truth, strict=True):
        assert expected.keys() == outside | {f"blocks.{i}" for i in range(3)}
        assert found == {("AdamW", block): pytest.approx(value, rel=1e-5) for block, value in expected.items()}


def test_optimizers_that_share_blocks_and_step_twice() -> None:
    model = gpt()
    named = list(model.named_parameters())
    matrices, others = ([(n, p) for n, p in named if (p.ndim == 2) == wide] for wide in (True, False))
    optimizers = {n: torch.optim.SGD([p for _, p in ps], lr=0.1) for n, ps in (("m", matrices), ("v", others))}
    diagnostics, sums = diagnose(model, optimizers), []
    for i in range(2):
        with diagnostics.step() as step:
            squares: list[dict[str, float]] = []
            for part in (2 * i, 2 * i + 1):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                step.loss(loss_of(model, batch(part))).backward()
                step.gradients("m")
                squares.append({b: v**2 for b, v in by_hand(matrices).items()})
                optimizers["m"].step()
            step.gradients("v")
            sums.append((squares, by_hand(others)))
            optimizers["v"].step()
    diagnostics.finish()
    for found, (squares, single) in zip(rows(diagnostics), sums, strict=True):
        twice = {("m", b): pytest.approx(np.sqrt((v + squares[1][b]) / 2), rel=1e-5) for b, v in squares[0].items()}
        once = {("v", b): pytest.approx(v, rel=1e-5) for b, v in single.items()}
        assert found == twice | once


class Odd(nn.Module):
    """Blocks of two weights, a sparse embedding, a tied head, an empty tensor and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3, sparse=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)) for _ in range(3))
        self.empty = nn.Embedding(0, 2)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 3)


VALUES = st.sampled_from([0.0, 1.0, -2.5, 1e-18, 1e18, float("nan"), float("inf"), float("-inf")])
NAMES = [n for n, _ in Odd().named_parameters()]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.sets(st.sampled_from(NAMES)))
def test_whatever_gradients_there_are(odd: dict[str, float], missing: set[str]) -> None:
    torch.manual_seed(0)
    model = Odd()
    model.frozen.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    with diagnostics.step() as step:
        for name, p in model.named_parameters():
            if name in missing or not p.requires_grad:
                continue
            p.grad = torch.randn_like(p)
            if name in odd and p.numel():
                p.grad.view(-1)[0] = odd[name]
            if name == "embed.weight":  # its second row twice, as for a token that occurs twice
                at = torch.tensor([[0, 1, 1]])
                met = torch.stack([p.grad[0], p.grad[1], p.grad[1]])
                p.grad = torch.sparse_coo_tensor(at, met, p.shape, check_invariants=True)
        expected = by_hand(model.named_parameters())
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    if not expected:
        assert "gradient/block_norm" not in diagnostics.history
        return
    (found,), (norm,) = rows(diagnostics), rows(diagnostics, "gradient/norm")
    assert set(found) == {("SGD", block) for block in expected}
    assert ("SGD", "head") not in found and ("SGD", "frozen") not in found
    near: Callable[..., Any] = np.testing.assert_allclose
    with np.errstate(over="ignore"):
        near([found["SGD", b] for b in expected], np.float32(list(expected.values())), rtol=1e-5)
        near(norm["SGD",], np.float32(np.sqrt(np.sum(np.square(list(expected.values()))))), rtol=1e-5)


def train(rank: int, kind: str) -> list[dict[tuple[str, ...], float]]:
    model: nn.Module = gpt(width=18, layers=3)  # sizes that two ranks cannot share evenly
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer)
    for i in range(3):
        items = [2 * i, 2 * i + 1] if kind == "alone" else [2 * i + rank]
        with diagnostics.step() as step:
            step.loss(torch.stack([loss_of(model, batch(j)) for j in items]).mean()).backward()
            step.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    applied = rows(diagnostics, "gradient/norm_applied")
    return rows(diagnostics) + applied


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_measure_what_one_process_measures(kind: str) -> None:
    first, second = run_on_ranks(train, kind)
    assert first == second
    for found, expected in zip(first, train(0, "alone"), strict=True):
        assert found == {cell: pytest.approx(value, rel=1e-4) for cell, value in expected.items()}
    assert first[-1] == {("SGD",): pytest.approx(0.01, rel=1e-3)}


class Stage(nn.Module):
    """A part of a model whose layers lie on two ranks: rank 1 holds but one layer, in which it sees no stack."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        mine = range(3) if rank == 0 else range(3, 4)
        self.layers = nn.ModuleDict({str(i): nn.Sequential(nn.Linear(4, 4, bias=False)) for i in mine})


def pipelined(rank: int) -> list[dict[tuple[str, ...], float]]:
    model = Stage(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    with diagnostics.step() as step:
        for i, layer in model.layers.items():
            layer[0].weight.grad = torch.full((4, 4), 1.0 + int(i))
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    return rows(diagnostics)


def test_ranks_with_other_parts_of_the_model_name_the_same_blocks() -> None:
    first, second = run_on_ranks(pipelined)
    assert first == second
    assert {block for _, block in first[0]} >= {f"layers.{i}" for i in range(3)} and len(first[0]) == 4
