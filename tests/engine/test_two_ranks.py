"""Two gloo ranks: the same verdict on both, and no hang whatever one of them does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_on_ranks
from traindiag.capture.taps import AttentionCall, AttentionTap
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.engine.diagnostics import Diagnostics
from traindiag.monitors.attention import AttentionMonitor
from traindiag.record.frame import Reading
from traindiag.rules.threshold import Threshold

STEPS = 12


class FailsOnRankOne(AttentionMonitor):
    """Raises in the forward pass of one rank, from the second sample on."""

    name = "fragile"
    rank = 0
    calls = 0

    def taps(self) -> Sequence[AttentionTap]:
        def observe(call: AttentionCall) -> None:
            self.calls += 1
            if self.rank == 1 and self.calls > 2:
                raise ZeroDivisionError("injected")

        return [AttentionTap(observe)]

    def readings(self, states: Any) -> Sequence[Reading]:
        return []


class ExtraBlockOnRankOne(nn.Module):
    """Runs its second block on rank 1 only: a cell that one rank has and the other has not."""

    def __init__(self, rank: int, everywhere: bool) -> None:
        super().__init__()
        self.gpt = GPT(GPTConfig(layers=2, width=16, heads=2, context=16))
        self.skip = rank == 0 and not everywhere

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        gpt = self.gpt
        x = gpt.token_embedding(tokens) + gpt.position_embedding.weight
        for block in gpt.blocks[: 1 if self.skip else 2]:
            x = block(x)
        return gpt.head(gpt.final_norm(x))


def train(rank: int, *, fail: bool, everywhere: bool, nan_on: int | None, cadence: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(ExtraBlockOnRankOne(rank, everywhere), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = FailsOnRankOne()
    monitor.rank = rank
    rules = [
        Threshold("loss/value", above=0.0, name="always"),
        Threshold("user/number", above=0.5, name="user"),
        Threshold("attention/max_logit", above=-100.0, persistence=2, name="logit"),
    ]
    diagnostics = Diagnostics(
        model,
        optimizer,
        monitors=[monitor] if fail else [],
        rules=rules,
        every_n_steps=cadence,
        terminal=False,
    )
    generator = torch.Generator().manual_seed(rank)
    caught: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(STEPS):
            with diagnostics.step() as s:
                tokens = torch.randint(256, (2, 17), generator=generator)
                loss, _ = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
                if nan_on == rank and step == 5:
                    loss = loss * torch.nan
                s.loss(loss).backward()
                s.gradients()
                if rank == 1 and step >= 4:  # a number that only one rank logs, from the middle on
                    diagnostics.log("user/number", float(step))
                optimizer.step()
                optimizer.zero_grad()
        diagnostics.finish()
        caught = [str(w.message) for w in seen if "traindiag" in str(w.message)]
    history = diagnostics.history
    return {
        "alerts": [a.to_dict() | {"time": 0} for a in diagnostics.alerts],
        "history": {
            name: (series.steps.tolist(), series.cells.labels, np.nan_to_num(series.values, nan=-1.0), series.seen)
            for name, series in history.items()
        },
        "warnings": caught,
    }


def _healthy(rank: int) -> dict[str, Any]:
    return train(rank, fail=False, everywhere=True, nan_on=None)


def _all_at_once(rank: int) -> dict[str, Any]:
    return train(rank, fail=True, everywhere=False, nan_on=1)


def without_pace(alerts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in a.items() if k != "time_to_limit"} for a in alerts]


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert without_pace(first["alerts"]) == without_pace(second["alerts"])
    assert first["history"].keys() == second["history"].keys()
    for name, (steps, labels, values, seen) in first["history"].items():
        other = second["history"][name]
        assert (steps, labels) == other[:2], name
        np.testing.assert_array_equal(values, other[2], name)
        np.testing.assert_array_equal(seen, other[3], name)


def test_same_numbers_and_alerts_on_both_ranks() -> None:
    first, second = run_on_ranks(_healthy)
    assert_same(first, second)
    assert {"always", "logit", "user"} <= {a["rule"] for a in first["alerts"]}


def test_numbers_are_those_of_one_process_on_both_batches() -> None:
    first, _ = run_on_ranks(_healthy)
    torch.manual_seed(0)
    model = ExtraBlockOnRankOne(0, everywhere=True)
    generators = [torch.Generator().manual_seed(r) for r in range(2)]
    losses = []
    for generator in generators:
        tokens = torch.randint(256, (2, 17), generator=generator)
        losses.append(next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])[0])
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
    np.testing.assert_allclose(first["history"]["loss/value"][2][0, 0], mean.item(), rtol=1e-6)
    np.testing.assert_allclose(first["history"]["gradient/norm"][2][0, 0], norm.item(), rtol=1e-5)


def test_fault_on_one_rank_and_a_cell_of_one_rank_hang_nothing() -> None:
    first, second = run_on_ranks(_all_at_once)
    assert_same(first, second)
    labels = first["history"]["attention/max_logit"][1]
    assert any("blocks.1" in label for label in labels)  # rank 0 never ran that block and knows its numbers
    for result in (first, second):
        assert sum("'fragile' is switched off" in w for w in result["warnings"]) == 1
    assert "ZeroDivisionError: injected" in " ".join(second["warnings"])
    bad = [a for a in first["alerts"] if a["rule"] == "nonfinite" and a["status"] == "opened"]
    assert [a["step"] for a in bad] == [5]


def _lightning(rank: int) -> tuple[list[dict[str, Any]], list[float]]:
    from tests.lightning_runs.run import fit
    from traindiag import TrainingDiagnostics

    diagnostics = TrainingDiagnostics(
        rules=[Threshold("attention/max_logit", above=-100.0, name="logit")], every_n_steps=2, terminal=False
    )
    fit([diagnostics], steps=5, strategy="ddp", devices=2, dropout=0.1, accumulate_grad_batches=2)
    norms = diagnostics.history["gradient/norm"].values[:, 0].tolist()
    return [a.to_dict() | {"time": 0} for a in diagnostics.alerts], norms


def test_lightning_ddp_tells_the_same_on_both_ranks() -> None:
    (first, norms), (second, other_norms) = run_on_ranks(_lightning)
    assert without_pace(first) == without_pace(second) and norms == other_norms
    assert len(norms) == 5 and any(a["rule"] == "logit" for a in first)
