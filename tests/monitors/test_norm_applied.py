"""The norm that clipping leaves, beside the one before it, against the raw gradients that the optimizer was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.monitors.test_optimizer import diagnose
from traindiag.engine.diagnostics import Diagnostics

STEPS = 7
EVERY = 3
SAMPLES = [0, 3, 6]


def norm(parameters: Any) -> float:
    grads = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(grads).square().sum().sqrt())


def by_norm(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.01)


def by_value(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 1e-3)


def not_at_all(parameters: list[nn.Parameter]) -> None:
    pass


CLIPS = [by_norm, by_value, not_at_all]


def check(diagnostics: Diagnostics, before: list[float], after: list[float]) -> None:
    found, applied = (diagnostics.history[f"gradient/{n}"] for n in ("norm", "norm_applied"))
    assert found.steps.tolist() == list(range(len(before))) and applied.steps.tolist() == SAMPLES
    np.testing.assert_allclose(found.values[:, 0], before, rtol=1e-5)
    np.testing.assert_allclose(applied.values[:, 0], np.array(after)[SAMPLES], rtol=1e-5)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("closure", [None, "positional", "keyword"])
def test_both_norms(clip: Callable[[list[nn.Parameter]], None], closure: str | None) -> None:
    """Nesterov's SGD over many tensors at once writes over its gradients as it steps."""
    model = gpt()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    diagnostics, before, after = diagnose(model, optimizer, every_n_steps=EVERY), [], []
    for i in range(STEPS):
        with diagnostics.step() as step:

            def evaluate(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = step.loss(loss_of(model, batch(i)))
                loss.backward()
                before.append(norm(parameters))
                step.gradients()
                clip(parameters)
                after.append(norm(parameters))
                return loss

            if closure is None:
                evaluate()
                optimizer.step()
            elif closure == "positional":
                assert isinstance(optimizer.step(evaluate), Tensor)  # type: ignore[arg-type]
            else:
                assert isinstance(optimizer.step(closure=evaluate), Tensor)  # type: ignore[arg-type]
    diagnostics.finish()
    check(diagnostics, before, after)
    assert (after[-1] < before[-1] / 2) == (clip is not not_at_all)


@pytest.mark.parametrize(("fused", "unscaled"), [(False, True), (True, True), (True, False)])
def test_under_a_loss_scale(fused: bool, unscaled: bool) -> None:
    model = gpt()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    diagnostics, before, after = diagnose(model, optimizer, every_n_steps=EVERY), [], []
    for i in range(STEPS):
        with diagnostics.step() as step:
            optimizer.zero_grad()
            scaler.scale(step.loss(loss_of(model, batch(i)))).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scale = 1.0 if unscaled else scaler.get_scale()
            before.append(norm(parameters) / scale)
            step.gradients(scale=None if unscaled else scale)
            if unscaled:
                by_norm(parameters)
            after.append(norm(parameters) / scale)
            scaler.step(optimizer)
            scaler.update()
    diagnostics.finish()
    check(diagnostics, before, after)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_has_applied_nothing(fused: bool) -> None:
    model = gpt(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    for i in range(4):
        with diagnostics.step() as step:
            optimizer.zero_grad()
            scaler.scale(step.loss(loss_of(model, batch(i))) * (torch.inf if i == 2 else 1)).backward()
            step.gradients(scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    diagnostics.finish()
    applied = diagnostics.history["gradient/norm_applied"]
    assert applied.steps[applied.seen[:, 0]].tolist() == [0, 1, 3] and np.isfinite(applied.values[applied.seen]).all()
    assert not np.isfinite(diagnostics.history["gradient/norm"].values[2, 0])


def test_of_several_evaluations_the_last_one_counts() -> None:
    model = gpt(layers=1)
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
    diagnostics, last = diagnose(model, optimizer), []
    for i in range(2):
        with diagnostics.step() as step:

            def evaluate(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch(i))
                loss.backward()
                step.gradients()
                by_norm(parameters)
                last.append(norm(parameters))
                return loss

            optimizer.step(evaluate)  # type: ignore[arg-type]
    diagnostics.finish()
    applied = diagnostics.history["gradient/norm_applied"]
    assert len(last) > 4
    np.testing.assert_allclose(applied.values[:, 0], 0.01, rtol=1e-3)


def test_several_updates_in_a_step_and_optimizers_that_are_shown_or_not() -> None:
    model = gpt(layers=1)
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizers = {"head": torch.optim.SGD(head, lr=0.1), "body": torch.optim.SGD(body, lr=0.1)}
    diagnostics = diagnose(model, optimizers, every_n_steps=2)
    clipped, unseen = [], []
    for i in range(3):
        with diagnostics.step() as step:
            squares = []
            for part in range(2):
                model.zero_grad()
                step.loss(loss_of(model, batch(2 * i + part))).backward()
                step.gradients("head")
                nn.utils.clip_grad_norm_(head, 0.01 * (part + 1))
                squares.append(norm(head) ** 2)
                optimizers["head"].step()
            clipped.append(np.sqrt(np.mean(squares)))
            nn.utils.clip_grad_norm_(body, 0.02)
            unseen.append(norm(body))
            optimizers["body"].step()
    diagnostics.finish()
    applied = diagnostics.history["gradient/norm_applied"]
    at = {str(c.coordinates[0]): i for i, c in enumerate(applied.cells)}
    assert applied.seen[:, at["head"]].tolist() == [True, False, True] and applied.seen[:, at["body"]].all()
    np.testing.assert_allclose(applied.values[::2, at["head"]], clipped[::2], rtol=1e-5)
    np.testing.assert_allclose(applied.values[:, at["body"]], unseen, rtol=1e-5)
    assert [str(c) for c in diagnostics.history["gradient/norm"].cells] == ["head"]


def test_a_norm_whose_square_float32_does_not_hold() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(9)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    diagnostics = diagnose(model, optimizer)
    with diagnostics.step() as step:
        for p in model.parameters():
            p.grad = torch.full((2, 2), 0.5e19)
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    for name, value in (("norm", 3e19), ("norm_applied", 3e19), ("block_norm", 1e19), ("parameter_norm", 1e19)):
        assert diagnostics.history[f"gradient/{name}"].values[0, 0] == pytest.approx(value, rel=1e-5), name
