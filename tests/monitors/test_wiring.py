"""Each way of wiring a run wrongly raises its own flag, and a right one raises none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.monitors.test_optimizer import Pulled, diagnose, pulls, values
from traindiag.engine.diagnostics import Diagnostics

FLAGS = ("ungraded", "unchanged", "frozen_changed", "replicas_differ")


def flagged(diagnostics: Diagnostics, flag: str) -> dict[str, list[int]]:
    """``{parameter: steps}`` at which the flag was 1."""
    if f"wiring/{flag}" not in diagnostics.history:
        return {}
    steps = diagnostics.history[f"wiring/{flag}"].steps
    found = {name: steps[series == 1].tolist() for name, series in values(diagnostics, f"wiring/{flag}").items()}
    return {name: at for name, at in found.items() if at}


def train(model: nn.Module, optimizers: Any, steps: int = 4, **hooks: Any) -> Diagnostics:
    """``hooks``: ``before(i)`` the forward pass, ``loss(model, pull)``, ``after(i)`` the update, ``every``."""
    diagnostics = diagnose(model, optimizers, every_n_steps=hooks.get("every", 1))
    several = list(optimizers.values()) if isinstance(optimizers, dict) else [optimizers]
    for i, pull in enumerate(pulls(steps)):
        with diagnostics.step() as step:
            hooks.get("before", lambda i: None)(i)
            for optimizer in several:
                optimizer.zero_grad()
            step.loss(hooks.get("loss", lambda m, p: m(p))(model, pull)).backward()
            step.gradients()
            for optimizer in several:
                optimizer.step()
            hooks.get("after", lambda i: None)(i)
    diagnostics.finish()
    return diagnostics


def test_a_right_run_raises_no_flag() -> None:
    model = Pulled()
    model.conv.requires_grad_(False)
    diagnostics = train(model, torch.optim.AdamW([model.matrix, model.vector], lr=0.01))
    assert {flag: flagged(diagnostics, flag) for flag in FLAGS} == {flag: {} for flag in FLAGS}
    assert {n: set(v) for n, v in values(diagnostics, "wiring/owners").items()} == {"matrix": {1.0}, "vector": {1.0}}
    # each was looked at: silence is not blindness
    assert (values(diagnostics, "wiring/ungraded")["matrix"] == 0).all()
    assert (values(diagnostics, "wiring/unchanged")["matrix"] == 0).all()
    assert diagnostics.history["wiring/frozen_changed"].steps.tolist() == [
        1,
        2,
        3,
    ]  # the first one has none before it
    assert (values(diagnostics, "wiring/frozen_changed")["conv"] == 0).all()
    assert "wiring/replicas_differ" not in diagnostics.history  # one rank


def test_a_tensor_outside_the_graph_is_ungraded() -> None:
    model = Pulled()
    diagnostics = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        loss=lambda m, p: (m.matrix * p["matrix"]).sum() + (m.conv * p["conv"]).sum(),
    )
    assert flagged(diagnostics, "ungraded") == {"vector": [0, 1, 2, 3]}
    assert flagged(diagnostics, "unchanged") == {}


def test_a_branch_used_now_and_then_is_ungraded_then() -> None:
    model = Pulled()
    calls = iter(range(10))

    def loss(m: Pulled, p: dict[str, Tensor]) -> Tensor:
        rest = (m.matrix * p["matrix"]).sum() + (m.conv * p["conv"]).sum()
        return rest + (m.vector * p["vector"]).sum() if next(calls) % 2 else rest

    diagnostics = train(model, torch.optim.AdamW(model.parameters(), lr=0.01), loss=loss)
    assert flagged(diagnostics, "ungraded") == {"vector": [0, 2]}


class Forgetful(torch.optim.SGD):
    """Loses track of one tensor, as a copy of the parameters made before ``model.to(...)`` would."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        kept = self.param_groups[0]["params"][0].detach().clone()
        super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0].copy_(kept)


def test_a_tensor_that_the_step_leaves_alone_is_unchanged() -> None:
    model = Pulled()
    diagnostics = train(model, Forgetful(model.parameters(), lr=0.1))
    assert flagged(diagnostics, "unchanged") == {"matrix": [0, 1, 2, 3]}
    assert diagnostics.updates == {"Forgetful": 4}  # its step calls that of SGD, and both call our hooks


def test_updates_lost_in_rounding_are_unchanged() -> None:
    model = Pulled(dtype=torch.bfloat16)
    with torch.no_grad():
        model.vector.fill_(1.0)
    optimizer = torch.optim.AdamW([{"params": [model.vector], "lr": 1e-4}, {"params": [model.matrix, model.conv]}])
    assert "vector" in flagged(train(model, optimizer), "unchanged")


def test_a_learning_rate_of_zero_is_no_fault() -> None:
    for rate in (0.0, torch.tensor(0.0)):
        model = Pulled()
        diagnostics = train(model, torch.optim.AdamW(model.parameters(), lr=rate, foreach=False))
        assert "wiring/unchanged" not in diagnostics.history
        assert (values(diagnostics, "optimizer/update_rms")["matrix"] == 0).all()


def test_a_frozen_tensor_that_changes() -> None:
    model = Pulled()
    model.conv.requires_grad_(False)

    def after(i: int) -> None:
        if i == 2:
            with torch.no_grad():
                model.conv[0, 0, 0, 0] *= -1

    diagnostics = train(model, torch.optim.SGD([model.matrix, model.vector], lr=0.1), after=after)
    assert flagged(diagnostics, "frozen_changed") == {"conv": [2]}


def test_weight_decay_on_a_frozen_tensor_is_seen() -> None:
    model = Pulled()
    model.conv.requires_grad_(False)

    def before(i: int) -> None:
        model.conv.grad = torch.zeros_like(model.conv)  # zero_grad(set_to_none=False) of old

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad = lambda *_: [setattr(p, "grad", None) for p in (model.matrix, model.vector)]  # type: ignore[assignment]
    diagnostics = train(model, optimizer, before=before)
    assert flagged(diagnostics, "frozen_changed") == {"conv": [1, 2, 3]}


def test_thawing_is_not_a_changed_frozen_tensor() -> None:
    model = Pulled()
    model.conv.requires_grad_(False)
    optimizer = torch.optim.SGD([model.matrix, model.vector], lr=0.1)

    def before(i: int) -> None:
        if i == 2:
            model.conv.requires_grad_(True)
            optimizer.add_param_group({"params": [model.conv]})

    diagnostics = train(model, optimizer, before=before)
    assert flagged(diagnostics, "frozen_changed") == {}
    assert values(diagnostics, "wiring/owners")["conv"][-1] == 1


def test_freezing_is_not_a_changed_frozen_tensor() -> None:
    model = Pulled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def before(i: int) -> None:
        if i == 4:  # it has moved since it was looked at in step 2
            model.conv.requires_grad_(False)

    diagnostics = train(model, optimizer, steps=8, before=before, every=2)
    assert flagged(diagnostics, "frozen_changed") == {}
    assert diagnostics.history["wiring/frozen_changed"].steps[0] == 6


def test_owners() -> None:
    model = Pulled()
    shared, alone = torch.optim.SGD([model.matrix, model.vector], lr=0.1), torch.optim.SGD([model.vector], lr=0.1)
    diagnostics = train(model, {"a": shared, "b": alone}, steps=1)
    assert {n: v[0] for n, v in values(diagnostics, "wiring/owners").items()} == {"matrix": 1, "vector": 2, "conv": 0}


def test_an_optimizer_over_copies_says_nothing_about_owners() -> None:
    model = Pulled()
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]

    def after(i: int) -> None:
        with torch.no_grad():
            for p, c in zip(model.parameters(), copies):
                p.copy_(c)

    diagnostics = train(model, torch.optim.SGD(copies, lr=0.1), after=after)
    assert "wiring/owners" not in diagnostics.history
    assert any(c.family == "wiring" and "wiring/owners" in c.places for c in diagnostics.coverage)


def test_an_optimizer_that_clears_gradients_inside_its_step_hides_them() -> None:
    class Clears(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            self.zero_grad()

    model = Pulled()
    diagnostics = train(model, Clears(model.parameters(), lr=0.1))
    assert "wiring/ungraded" not in diagnostics.history and "wiring/unchanged" not in diagnostics.history
    assert "optimizer/update_rms" in diagnostics.history


def test_an_optimizer_that_never_gets_a_gradient_is_ungraded() -> None:
    model = Pulled()
    used, unused = torch.optim.SGD([model.matrix, model.conv], lr=0.1), torch.optim.AdamW([model.vector], lr=0.1)
    diagnostics = train(
        model,
        {"used": used, "unused": unused},
        loss=lambda m, p: (m.matrix * p["matrix"]).sum() + (m.conv * p["conv"]).sum(),
    )
    assert flagged(diagnostics, "ungraded") == {"vector": [0, 1, 2, 3]}


# -- structural zeros: told as they are, and no flag ------------------------------------------------


class LoRA(nn.Module):
    """A frozen matrix with a low-rank correction that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(6, 6, generator=generator), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(2, 6, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.lora_B @ self.lora_A).T


def test_lora_comes_alive_after_its_first_step() -> None:
    model = LoRA()
    optimizer = torch.optim.SGD([model.lora_A, model.lora_B], lr=0.1)
    diagnostics = train(model, optimizer, loss=lambda m, p: m(torch.ones(2, 6)).square().mean())
    assert values(diagnostics, "gradient/zero_fraction")["lora_A"].tolist() == [1, 0, 0, 0]
    assert values(diagnostics, "gradient/rms")["lora_A"][0] == 0
    assert np.isnan(values(diagnostics, "wiring/unchanged")["lora_A"]).tolist() == [True, False, False, False]
    assert np.isnan(values(diagnostics, "optimizer/update_ratio")["lora_B"]).tolist() == [True, False, False, False]
    assert all(flagged(diagnostics, flag) == {} for flag in FLAGS)


def test_rows_of_an_embedding_that_were_not_met() -> None:
    model = nn.Embedding(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = train(model, optimizer, loss=lambda m, p: m(torch.tensor([1, 2])).square().sum())
    assert values(diagnostics, "gradient/zero_fraction")["weight"].tolist() == [0.75] * 4
    assert all(flagged(diagnostics, flag) == {} for flag in FLAGS)


def test_a_key_bias_that_softmax_cancels_moves_by_rounding_and_raises_nothing() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))

    torch.manual_seed(0)
    model, x = Keys(), torch.randn(2, 1, 5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    diagnostics = train(model, optimizer, loss=lambda m, p: m(x).square().mean())
    over_eps = values(diagnostics, "optimizer/grad_rms_over_eps")
    assert over_eps["key.bias"].max() < 10 < 1e3 < over_eps["key.weight"].min()
    assert all(flagged(diagnostics, flag) == {} for flag in FLAGS)
