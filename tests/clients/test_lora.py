"""Adapters from peft around a Llama: names without the wrapper, and a first step in which half of them rests."""

from __future__ import annotations

import pytest
from torch import nn

from tests.clients.run import STEPS, Client, own_name
from tests.clients.test_decoders import language_loss, llama

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft of transformers
def test_lora() -> None:
    def build() -> nn.Module:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
        model: nn.Module = peft.get_peft_model(llama(), config)
        return model

    client = Client(build, language_loss)
    client.assert_attention({f"model.layers.{i}.self_attn": 4 for i in range(2)}, "bound")
    client.assert_output("LlamaForCausalLM")
    client.assert_activations("model.layers.0", "model.layers.1", stacks=["model.layers"])
    named = {own_name(name): p for name, p in client.run.model.named_parameters()}
    client.assert_parameters(frozen=[name for name, p in named.items() if not p.requires_grad])
    assert client.trained == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{half}.default.weight"
        for i in range(2)
        for p in "qv"
        for half in "AB"
    }
    for name in client.trained:
        rests = "lora_A" in name  # until B, which begins at zero, has moved
        zero = client.of("gradient/zero_fraction", name)
        assert (zero[0] == 1) == rests and max(zero[1:]) < 1
        assert len(client.of("wiring/unchanged", name)) == (STEPS - 1 if rests else STEPS)
