"""Module hooks split a compiled model: one graph becomes a dozen, with as many breaks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.field_bugs.loop import batch, gpt, loss_of
from traindiag.engine.diagnostics import Diagnostics


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    gc.collect()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs(how: str, watched: bool, tmp_path: Path) -> tuple[int, int]:
    torch._dynamo.reset()
    counters.clear()
    bare = gpt()
    model: nn.Module = bare
    if how == "wrapped":
        model = torch.compile(bare, backend="aot_eager")  # type: ignore[assignment]
    else:
        bare.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(bare.parameters())
    diagnostics = Diagnostics(bare, optimizer, tmp_path, every_n_steps=2, terminal=False) if watched else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(5):
            if diagnostics is None:
                loss_of(model, batch(i)).backward()
                optimizer.step()
            else:
                with diagnostics.step() as step:
                    step.loss(loss_of(model, batch(i))).backward()
                    step.gradients()
                    optimizer.step()
            optimizer.zero_grad()
    if diagnostics is not None:
        diagnostics.finish()
        assert len(diagnostics.history["gradient/norm"]) == 5
        assert any(c.sight == "unseen" and "compiled" in c.reason for c in diagnostics.coverage)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_as_many_graphs_and_breaks_as_without(how: str, tmp_path: Path) -> None:
    without = graphs(how, False, tmp_path)
    assert without == (1, 0)
    assert graphs(how, True, tmp_path) == without
