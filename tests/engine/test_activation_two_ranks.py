"""Activations of two ranks together, against one process that sees both batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_on_ranks
from traindiag.engine.diagnostics import Diagnostics

ROWS = (3, 11)  # ranks see batches of different size


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for block in self.blocks[: 2 if skip else 3]:
            x = block(x)
        return x


def batch(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (1 + 9 * rank) * torch.randn(ROWS[rank], 6, generator=generator)


def _measure(rank: int, skip_on: int, broken_on: int) -> dict[str, Any]:
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    diagnostics = Diagnostics(model, optimizer, terminal=False, every_n_steps=1, default_rules=False)
    x = batch(rank)
    for step in range(2):
        with diagnostics.step() as s:
            if step == 1 and rank == broken_on:
                x[0] = torch.nan
            s.loss(model(x, skip=rank == skip_on).sum()).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    found = {n: s for n, s in diagnostics.history.items() if n.startswith("activation/")}
    return {n: (s.cells.labels, np.array(s.values), np.array(s.seen)) for n, s in found.items()}


def truth(block: int, ranks: tuple[int, ...]) -> np.ndarray:
    """What ``block`` returns on these ranks, ``[rows, features]``, by plain products."""
    x = np.concatenate([batch(r).double().numpy() for r in ranks])
    for layer in Net().blocks[: block + 1]:
        linear: nn.Linear = layer[0]  # type: ignore[index, assignment]
        x = np.maximum(x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy(), 0)
    return x


def test_reduced_states_are_those_of_one_process() -> None:
    first, second = run_on_ranks(_measure, 0, 1)
    for name, (labels, values, seen) in first.items():
        assert labels == second[name][0]
        np.testing.assert_array_equal(values, second[name][1])
        np.testing.assert_array_equal(seen, second[name][2])
    assert first["activation/rms"][0] == ("blocks.0", "blocks.1", "blocks.2")
    for block, ranks in enumerate([(0, 1), (0, 1), (1,)]):  # rank 0 never ran the last block
        x = truth(block, ranks)
        expected = {"rms": np.sqrt(np.mean(x**2)), "max": np.abs(x).max(), "zero_fraction": np.mean(x == 0)}
        for name, value in expected.items():
            np.testing.assert_allclose(first[f"activation/{name}"][1][0, block], value, rtol=1e-5)
        each = [truth(block, (r,)) for r in ranks]
        found = first["activation/kurtosis"][1][0, block]
        shares = np.mean(x**2, axis=0)
        assert found >= np.mean(shares**2) / np.mean(shares) ** 2 * (1 - 1e-5)
        of_ranks = [np.mean(np.mean(e**2, 0) ** 2) / np.mean(e**2) ** 2 for e in each]
        np.testing.assert_allclose(found, np.average(of_ranks, weights=[np.sum(e**2) for e in each]), rtol=1e-5)
    rms = first["activation/rms"][1]
    np.testing.assert_allclose(
        first["activation/growth_exponent"][1][0], np.log(rms[0, 2] / rms[0, 0]) / 3, rtol=1e-5
    )
    for name in ("rms", "max"):
        assert np.isnan(first[f"activation/{name}"][1][1]).all(), "broken on one rank is broken on all"
    assert first["activation/nonfinite"][1].tolist() == [[0, 0, 0], [6, 6, 6]]
