"""Sound models of many kinds raise no warning about their wiring, and each fault raises its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ranks import run_on_ranks
from traindiag.alerts.alert import Alert
from traindiag.demo.model import GPT, Attention, GPTConfig
from traindiag.engine.diagnostics import Diagnostics

STEPS = 30
Loss = Callable[[nn.Module, Tensor], Tensor]


def alerts(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None = None,
    after: Callable[[int], None] = lambda i: None,
    steps: int = STEPS,
) -> list[Alert]:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    diagnostics = Diagnostics(model, optimizer, terminal=False, every_n_steps=2, max_overhead=None, strict=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(steps):
        with diagnostics.step() as step:
            tokens = torch.randint(0, 64, (2, 17), generator=generator)
            step.loss(loss(model, tokens)).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
            after(i)
    diagnostics.finish()
    return diagnostics.alerts


def severe(found: list[Alert]) -> list[tuple[str, str, int]]:
    return [(a.rule, a.where, a.step) for a in found if a.severity != "info"]


def plain(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def hugging_face(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=2, width=32, heads=2, vocabulary=64))


class Biased(Attention):
    """Queries, keys and values of their own, with biases: softmax cancels that of the keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        del self.query_key_value
        self.q, self.k, self.v = (nn.Linear(config.width, config.width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


class Experts(nn.Module):
    """One expert a call; the others get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        at = 1 if self.calls < 20 else 2
        out: Tensor = self.router(x).softmax(-1)[..., at, None] * self.experts[at](x)
        return out


def with_key_bias_behind_zero() -> tuple[nn.Module, Loss]:
    model = gpt()
    for block in model.blocks:
        block.attention = Biased(model.config)
        nn.init.zeros_(block.attention.project.weight)
    return model, plain


def with_idle_experts() -> tuple[nn.Module, Loss]:
    model = gpt()
    for block in model.blocks:
        block.mlp = Experts()
    return model, plain


def llama(lora: bool = False) -> tuple[nn.Module, Loss]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_attention_heads=2))
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    return model.train(), hugging_face


def gpt2() -> tuple[nn.Module, Loss]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train(), hugging_face


SOUND = {
    "plain": (lambda: (gpt(), plain), 0),
    "llama": (llama, 0),
    "tied head": (gpt2, 0),
    "lora": (lambda: llama(lora=True), 4),
    "idle experts": (with_idle_experts, 24),
    "key bias behind a zero": (with_key_bias_behind_zero, 14),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("kind", SOUND)
def test_sound_models_raise_no_warning(kind: str) -> None:
    make, sleepers = SOUND[kind]
    found = alerts(*make())
    assert severe(found) == []
    notes = [(a.step, a.evidence.split(" ")[0]) for a in found if a.status == "opened" and a.kind == "wiring"]
    assert notes == ([(0, str(sleepers))] if sleepers else [])  # one for all of them


LAME = "blocks.1.mlp.2.weight"


def test_a_tensor_that_the_optimizer_misses() -> None:
    model = gpt()
    rest = [p for n, p in model.named_parameters() if n != LAME]
    assert severe(alerts(model, plain, torch.optim.AdamW(rest, lr=1e-3))) == [("wiring/owners", LAME, 1)]


def test_a_tensor_that_is_detached_by_mistake() -> None:
    model = gpt()
    layer = model.blocks[1].mlp[2]
    layer.forward = lambda x: F.linear(x, layer.weight.detach())
    assert severe(alerts(model, plain)) == [("wiring/ungraded", f"AdamW {LAME}", 2)]


def test_a_group_with_a_learning_rate_of_zero() -> None:
    model = gpt()
    named = dict(model.named_parameters())
    lame = named.pop(LAME)
    optimizer = torch.optim.AdamW([{"params": list(named.values())}, {"params": [lame], "lr": 0.0}], lr=1e-3)
    assert severe(alerts(model, plain, optimizer)) == [("wiring/unchanged", f"AdamW {LAME}", 4)]


def test_a_frozen_tensor_that_something_writes_to() -> None:
    model = gpt()
    model.token_embedding.requires_grad_(False)

    def write(i: int) -> None:
        if i == 9:
            with torch.no_grad():
                model.token_embedding.weight[0, 0] += 1e-3

    assert severe(alerts(model, plain, after=write)) == [("wiring/frozen_changed", "token_embedding.weight", 9)]


def _nudged(rank: int, at: int | None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)

    def nudge(i: int) -> None:
        if rank == 1 and i == at:
            with torch.no_grad():
                model[1].weight[0, 0] += 1e-3

    return severe(alerts(wrapped, lambda m, t: m(t[:, :4].float() / 64).square().mean(), optimizer, nudge, 14))


def test_a_parameter_nudged_on_one_of_two_ranks() -> None:
    # told at the second sample that shows it, the same on both ranks
    assert run_on_ranks(_nudged, 5) == [[("wiring/replicas_differ", "1.weight", 8)]] * 2


def test_replicas_that_agree() -> None:
    assert run_on_ranks(_nudged, None) == [[], []]
