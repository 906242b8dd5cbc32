"""A loop without a line of ours inside it: closures, a model that is one attention layer, several optimizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from traindiag.engine.diagnostics import Diagnostics


def norm(model: nn.Module) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())


def quadratic() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "line search": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_that_a_closure_makes_are_those_of_its_last_call(kind: str, by_name: bool) -> None:
    model, x, y = quadratic()
    optimizer: Any = OPTIMIZERS[kind](model.parameters())
    diagnostics = Diagnostics.attach(model, optimizer, terminal=False, strict=True)
    last: list[float] = []
    truth: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        last.append(norm(model))
        return loss

    for _ in range(5):
        _ = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        truth.append(last[-1])
    diagnostics.detach()
    series = diagnostics.history["gradient/norm_applied"]
    assert series.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(series.values[:, 0], truth, rtol=1e-5)
    assert len(set(truth)) > 1  # a stale gradient would be the one before
    assert len(last) > 5 if kind in ("LBFGS", "line search") else len(last) == 5
    assert leftovers(model, optimizer) == NOTHING


def test_a_closure_in_a_loop_of_ones_own_may_show_its_gradients_before_clipping() -> None:
    model, x, y = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    diagnostics = Diagnostics(model, optimizer, terminal=False, strict=True)
    truth = []
    for _ in range(3):
        with diagnostics.step() as step:

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = step.loss(F.mse_loss(model(x), y))
                loss.backward()
                truth.append(norm(model))
                step.gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    diagnostics.finish()
    np.testing.assert_allclose(diagnostics.history["gradient/norm"].values[:, 0], truth, rtol=1e-5)
    applied = diagnostics.history["gradient/norm_applied"]
    assert applied.steps.tolist() == [0] and applied.values[0, 0] == pytest.approx(1e-3, rel=1e-3)


class OnlyAttention(nn.Module):
    """The root itself calls attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return F.scaled_dot_product_attention(q, q, x)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_model_that_is_one_attention_layer_is_seen_at_its_first_call(micro_batches: int) -> None:
    torch.manual_seed(0)
    model = OnlyAttention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics.attach(
        model, optimizer, every_n_steps=1, exact=True, max_overhead=None, terminal=False, strict=True
    )
    truth = []
    for _ in range(3):
        inputs = [torch.randn(2, 2, 6, 8) * (i + 1) for i in range(micro_batches)]
        with torch.no_grad():
            queries = [model.q(x).double() for x in inputs]
        truth.append(max(float((q @ q.mT).amax()) / 8**0.5 for q in queries))
        for x in inputs:
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    diagnostics.detach()
    series = diagnostics.history["attention/max_logit"]
    assert series.steps.tolist() == [0, 1, 2]
    np.testing.assert_allclose(series.values.max(1), truth, rtol=1e-5)
    assert {str(c.coordinates[0]) for c in series.cells} == {"OnlyAttention"}
    assert leftovers(model, optimizer) == NOTHING


def test_each_call_of_a_layer_is_counted_once() -> None:
    """The root is entered by hand; what is inside it by the hooks, and neither twice."""

    def rows(attach: bool) -> Any:
        model = gpt()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        diagnostics = (Diagnostics.attach if attach else Diagnostics)(
            model, optimizer, every_n_steps=1, exact=True, max_overhead=None, terminal=False
        )
        for i in range(2):
            if attach:
                loss_of(model, batch(i)).backward()
                optimizer.step()
            else:
                with diagnostics.step():
                    loss_of(model, batch(i)).backward()
                    optimizer.step()
        diagnostics.finish()
        return {n: diagnostics.history[f"attention/{n}"] for n in ("max_logit", "entropy", "query_norm")}

    for name, attached in rows(attach=True).items():
        own = rows(attach=False)[name]
        assert attached.cells.coordinates == own.cells.coordinates
        np.testing.assert_array_equal(attached.values, own.values)


class Policy(nn.Module):
    """A container: the loop calls its parts, one of which is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.target = OnlyAttention(), OnlyAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.target(x).detach())


def attached(call: Any) -> tuple[nn.Module, Diagnostics]:
    torch.manual_seed(0)
    model = Policy()
    optimizer = torch.optim.SGD(model.critic.parameters(), lr=0.1)
    diagnostics = Diagnostics.attach(
        model, optimizer, every_n_steps=1, max_overhead=None, terminal=False, strict=True
    )
    for _ in range(3):
        call(model, torch.randn(2, 2, 6, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    diagnostics.detach()
    assert leftovers(model, optimizer) == NOTHING
    return model, diagnostics


def test_a_loop_that_calls_the_parts_of_a_model_one_by_one() -> None:
    def call(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = model.target.eval()(x)
        return model.critic(x)

    _, diagnostics = attached(call)
    series = diagnostics.history["attention/max_logit"]
    assert series.steps.tolist() == [0, 1, 2]
    assert {c.coordinates[0] for c in series.cells} == {"critic"}


def test_a_trained_part_in_evaluation_mode_does_not_end_the_window_of_the_whole() -> None:
    def call(model: Any, x: Tensor) -> Tensor:
        model.critic.eval()
        return model(x)

    _, diagnostics = attached(call)
    assert diagnostics.history["attention/max_logit"].steps.tolist() == [0, 1, 2]
