"""What the activation monitor looks at, what it sends, and what it makes of what came back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.capture.oracle import reduced
from traindiag.capture.names import watch
from traindiag.capture.taps import ModuleCall, ModuleTap
from traindiag.capture.watched import Watched
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.engine.diagnostics import Diagnostics
from traindiag.monitors.activation import ActivationMonitor
from traindiag.record.frame import Reading
from traindiag.rules.threshold import Threshold


def gpt(layers: int = 3) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=layers, width=16, heads=2, context=16))


def watched(model: nn.Module, patterns: str = "*") -> Watched:
    return watch(model, torch.optim.SGD(model.parameters(), lr=0.1), patterns)


def prepared(model: nn.Module, monitor: ActivationMonitor | None = None) -> ActivationMonitor:
    monitor = monitor or ActivationMonitor()
    monitor.prepare(watched(model))
    return monitor


def places(monitor: ActivationMonitor) -> tuple[str, ...]:
    (tap,) = monitor.taps()
    assert isinstance(tap, ModuleTap)
    return tuple(tap.modules)


def sample(monitor: ActivationMonitor, *calls: tuple[str, Tensor]) -> dict[str, Reading]:
    (tap,) = monitor.taps()
    for layer, output in calls:
        tap.observe(ModuleCall(layer, output))  # type: ignore[arg-type]
    readings = monitor.readings({g.name: reduced(g) for g in monitor.collect()})
    return {r.signal.name.split("/")[1]: r for r in readings}


def test_calls_of_a_module_join_before_anything_is_computed() -> None:
    a, b = torch.randn(4, 8), 5 * torch.randn(2, 3, 8)
    b[0, 0] = 0
    found = sample(prepared(gpt()), ("blocks.0", a), ("blocks.0", b), ("blocks.2", b))
    together = np.concatenate([a.double().numpy(), b.double().numpy().reshape(-1, 8)])
    assert found["rms"].cells.coordinates == (("blocks.0",), ("blocks.2",))
    assert found["rms"].values[0] == pytest.approx(np.sqrt(np.mean(together**2)), rel=1e-5)
    assert found["max"].values[0] == np.abs(together).max()
    assert found["max"].ranks is not None
    assert found["zero_fraction"].values.tolist() == pytest.approx([8 / 80, 8 / 48])
    assert found["nonfinite"].values.tolist() == [0, 0]
    ratio = found["rms"].values[1] / found["rms"].values[0]
    assert found["growth_exponent"].cells.coordinates == (("blocks",),)
    assert found["growth_exponent"].values[0] == pytest.approx(math.log(ratio) / 3, rel=1e-5)
    assert sorted(found) == sorted(s.name.split("/")[1] for s in ActivationMonitor.signals)
    assert all(r.seen.all() for r in found.values())


def test_absent_is_not_nan_and_nan_is_not_absent() -> None:
    x = torch.randn(4, 8)
    broken = x.clone()
    broken[1, 2] = math.nan
    monitor = prepared(gpt())
    found = sample(monitor, ("blocks.0", torch.zeros(4, 8)), ("blocks.1", broken), ("blocks.2", x[:0]))
    assert found["rms"].cells.coordinates == (("blocks.0",), ("blocks.1",))
    assert found["rms"].values[0] == 0 and math.isnan(found["rms"].values[1])
    assert found["rms"].seen.all() and found["max"].seen.all()
    assert math.isnan(found["max"].values[1])
    assert found["nonfinite"].values.tolist() == [0, 1]
    assert found["kurtosis"].seen.tolist() == [False, True]
    assert found["zero_fraction"].values.tolist() == [1, 0]
    assert "growth_exponent" not in found
    growth = sample(monitor, ("blocks.0", x), ("blocks.2", broken))["growth_exponent"]
    assert growth.seen.all() and math.isnan(growth.values[0])
    assert "growth_exponent" not in sample(monitor, ("blocks.0", torch.zeros(4, 8)), ("blocks.2", x))


def test_nothing_seen_is_nothing_sent() -> None:
    monitor = prepared(gpt())
    assert sample(monitor) == {}
    sample(monitor, ("blocks.0", torch.ones(2, 2)))
    assert monitor.collect() == ()


def test_modules_on_request_join_the_blocks() -> None:
    blocks = ("blocks.0", "blocks.1", "blocks.2")
    assert places(prepared(gpt())) == blocks
    more = prepared(gpt(), ActivationMonitor(["*.mlp", "head", "blocks.1"]))
    assert places(more) == (*blocks, "blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "head")
    restricted = ActivationMonitor()
    restricted.prepare(watched(gpt(), "blocks.2"))
    assert places(restricted) == ("blocks.2",)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        ActivationMonitor(rows=0)
    with pytest.raises(TypeError, match=r"modules is a list of names or globs, got the string '\*.mlp'"):
        ActivationMonitor("*.mlp")
    with pytest.raises(
        ValueError, match=r"modules: 'blocks.0.mlpp' matches no module .* Did you mean 'blocks.0.mlp'"
    ):
        prepared(gpt(), ActivationMonitor(["blocks.0.mlpp"]))


def run(model: nn.Module, steps: int = 3, **settings: Any) -> Diagnostics:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    keywords = {"every_n_steps": 1, "terminal": False, "strict": True, **settings}
    diagnostics = Diagnostics(model, optimizer, **keywords)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with diagnostics.step() as step:
            for _ in range(2):
                t = torch.randint(256, (2, 17), generator=generator)
                step.loss(next_token_loss(model(t[:, :-1]), t[:, 1:])[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    return diagnostics


def test_a_run_against_hooks_of_ones_own() -> None:
    outputs: dict[int, list[Tensor]] = {}
    model = gpt()
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, x, y, i=i: outputs.setdefault(i, []).append(y.detach().double()))
    diagnostics = run(model)
    rms = diagnostics.history["activation/rms"]
    assert rms.cells.labels == ("blocks.0", "blocks.1", "blocks.2")
    for i in range(3):
        for step in range(3):
            x = torch.cat(outputs[i][2 * step : 2 * step + 2]).numpy()
            assert rms.values[step, i] == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-5)
            largest = diagnostics.history["activation/max"].values[step, i]
            assert largest == pytest.approx(np.abs(x).max(), rel=1e-6)
    (row,) = [c for c in diagnostics.coverage if c.family == "activation"]
    assert (row.sight, row.places) == ("exact", rms.cells.labels)


def test_a_broken_block_is_named() -> None:
    model = gpt()
    with torch.no_grad():
        model.blocks[1].mlp[2].weight[3, 5] = math.inf
    diagnostics = run(model, steps=1)
    values = diagnostics.history["activation/nonfinite"].values[0]
    assert values[0] == 0 and values[1] > 0 and values[2] > 0
    assert not np.isfinite(diagnostics.history["activation/growth_exponent"].values).any()
    assert any(a.kind == "nonfinite" for a in diagnostics.alerts)


def test_rules_judge_activations_and_a_faulty_pattern_is_told_at_once() -> None:
    rule = Threshold("activation/rms", above=0.0, persistence=1, name="any size")
    diagnostics = run(gpt(), rules=[rule], monitors=[ActivationMonitor(["*.mlp"])])
    assert "blocks.0.mlp" in diagnostics.history["activation/max"].cells.labels
    assert [a.rule for a in diagnostics.alerts if a.status == "opened"] == ["any size"]
    assert diagnostics.history["activation/growth_exponent"].cells.labels == ("blocks",)

    for strict in (True, False):  # a slip in a name is told before the first step
        with pytest.raises(ValueError, match=r"'\*\.mpl' matches no module that is being trained"):
            run(gpt(), monitors=[ActivationMonitor(["*.mpl"])], strict=strict)


def test_a_model_without_blocks_shows_its_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))
    with torch.no_grad():  # one channel of four carries everything
        model[0].weight[1:] = 0
        model[0].bias[1:] = 0
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), terminal=False, strict=True)
    with diagnostics.step() as step:
        step.loss(model(torch.randn(2, 3, 8, 8)).square().mean()).backward()
    diagnostics.finish()
    history = diagnostics.history
    assert history["activation/rms"].cells.labels == ("0", "3")
    assert "activation/growth_exponent" not in history
    assert history["activation/kurtosis"].values[0, 0] == pytest.approx(4)
