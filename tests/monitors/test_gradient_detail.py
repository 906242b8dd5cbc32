"""Gradient size per scalar, exact zeros, and clipping as it happened."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tests.monitors.test_optimizer import SHAPES, Pulled, diagnose, pulls, values
from traindiag.engine.diagnostics import Diagnostics
from traindiag.monitors.gradient_detail import CLIP_WINDOW, GradientDetailMonitor

Clip = Callable[[nn.Module, int], object]


def train(clip: Clip, steps: int = 4, shown: bool = True, scale: float | None = None) -> Diagnostics:
    model = Pulled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = diagnose(model, optimizer)
    for i, pull in enumerate(pulls(steps)):
        with diagnostics.step() as step:
            optimizer.zero_grad()
            (step.loss(model(pull)) * (scale or 1)).backward()
            if shown:
                step.gradients(scale=scale)
            if scale:
                for p in model.parameters():
                    p.grad /= scale
            clip(model, i)
            optimizer.step()
    diagnostics.finish()
    return diagnostics


def rate(diagnostics: Diagnostics) -> list[float]:
    return diagnostics.history["gradient/clip_rate"].values[:, 0].tolist()


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_rms_is_that_before_clipping_and_unscaled(scale: float | None) -> None:
    diagnostics = train(lambda m, i: nn.utils.clip_grad_norm_(m.parameters(), 0.01), scale=scale)
    for name in SHAPES:
        expected = [p[name].double().square().mean().sqrt() for p in pulls(4)]
        np.testing.assert_allclose(values(diagnostics, "gradient/rms")[name], expected, rtol=1e-5)


def test_rms_agrees_with_the_norm_of_every_step() -> None:
    diagnostics = train(lambda m, i: None)
    for name, shape in SHAPES.items():
        norm = values(diagnostics, "gradient/parameter_norm")[name]
        np.testing.assert_allclose(
            values(diagnostics, "gradient/rms")[name], norm / np.sqrt(np.prod(shape)), rtol=1e-5
        )


def test_clip_rate_is_the_share_of_clipped_steps() -> None:
    def clip(model: nn.Module, i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01 if i % 2 else 1e6)

    assert rate(train(clip)) == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])


def test_clipped_values_and_gradients_that_grew() -> None:
    assert rate(train(lambda m, i: nn.utils.clip_grad_value_(m.parameters(), 0.1)))[-1] == 1
    assert rate(train(lambda m, i: nn.utils.clip_grad_value_(m.parameters(), 1e3)))[-1] == 0

    def add_noise(model: nn.Module, i: int) -> None:
        for p in model.parameters():
            p.grad *= 1.5

    assert rate(train(add_noise))[-1] == 0


def test_unclipped_scaled_gradients_are_not_clipped() -> None:
    assert rate(train(lambda m, i: None, scale=65536.0))[-1] == 0


def test_clipping_that_cannot_be_seen_is_not_claimed() -> None:
    diagnostics = train(lambda m, i: nn.utils.clip_grad_norm_(m.parameters(), 0.01), shown=False)
    assert "gradient/clip_rate" not in diagnostics.history and "gradient/rms" not in diagnostics.history
    assert "gradient/zero_fraction" in diagnostics.history


def test_zero_fraction_counts_exact_zeros_only() -> None:
    model = Pulled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer)
    pull = pulls(1)[0]
    pull["matrix"][:3] = 0
    pull["matrix"][3, 0] = 1e-30
    pull["vector"][0] = torch.nan
    with diagnostics.step() as step:
        model(pull).backward()
        model.conv.grad = None
        step.gradients()
        optimizer.step()
    diagnostics.finish()
    found = values(diagnostics, "gradient/zero_fraction")
    assert found["matrix"][0] == pytest.approx(3 / 7) and found["vector"][0] == 0 and np.isnan(found["conv"][0])
    assert np.isnan(values(diagnostics, "gradient/rms")["vector"][0])


def test_several_updates_where_one_lacks_a_gradient() -> None:
    model = Pulled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = diagnose(model, optimizer)
    pull = {n: torch.zeros(s) for n, s in SHAPES.items()}
    with diagnostics.step() as step:
        for without in (True, False):
            optimizer.zero_grad()
            model(pull).backward()
            if without:
                model.vector.grad = None
            step.gradients()
            optimizer.step()
    diagnostics.finish()
    assert {n: v[0] for n, v in values(diagnostics, "gradient/zero_fraction").items()} == dict.fromkeys(SHAPES, 1.0)


def test_the_order_of_the_forward_pass_does_not_confuse_before_and_after() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(10 * self.first(x))
            return out

    torch.manual_seed(0)
    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    diagnostics = diagnose(model, optimizer, default_rules=False)
    for _ in range(2):
        for _ in range(2):
            with diagnostics.step() as step:
                optimizer.zero_grad()
                step.loss(model(torch.ones(2, 3)).square().mean()).backward()
                step.gradients()
                optimizer.step()
        diagnostics.finish()  # and the loop goes on, by then with parameters in the order of the forward pass
    assert diagnostics.watched.parameters["SGD"][0][0] == "first.weight"
    assert rate(diagnostics) == [0, 0, 0, 0]


def test_the_window_forgets_and_survives_a_checkpoint() -> None:
    monitor = GradientDetailMonitor()
    monitor.load_state_dict({"recent": {"AdamW": [1.0] * (CLIP_WINDOW + 5)}})
    assert monitor.state_dict() == {"recent": {"AdamW": [1.0] * CLIP_WINDOW}}

    whole = train(lambda m, i: nn.utils.clip_grad_norm_(m.parameters(), 0.01 if i < 3 else 1e6), steps=6)
    assert rate(whole) == pytest.approx([1, 1, 1, 3 / 4, 3 / 5, 3 / 6])
    assert whole.state_dict()["monitors"]["gradient_detail"] == {"recent": {"AdamW": [1, 1, 1, 0, 0, 0]}}
