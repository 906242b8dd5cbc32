"""Decoder-only language models from transformers, as they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.clients.run import STEPS, Client, text

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LAYERS = ("model.layers.0", "model.layers.1")
HEADS = dict.fromkeys((f"{layer}.self_attn" for layer in LAYERS), 4)


def language_loss(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(input_ids=text(step), labels=text(step)).loss
    return loss


def llama(kind: str = "sdpa") -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, attn_implementation=kind))


def assert_decoder(client: Client, sight: str = "bound") -> None:
    client.assert_attention(HEADS, sight)
    client.assert_output(type(client.run.model).__name__)
    client.assert_activations(*LAYERS, stacks=["model.layers"])


@pytest.mark.parametrize(("kind", "sight"), [("sdpa", "bound"), ("eager", "exact")])
def test_llama_with_grouped_queries(kind: str, sight: str) -> None:
    client = Client(lambda: llama(kind), language_loss)
    assert_decoder(client, sight)
    client.assert_parameters()
    key_norm = client.history["attention/key_norm"].grid("layer", "head")
    assert (key_norm[..., ::2] == key_norm[..., 1::2]).all()  # two query heads share a key head
    assert (client.history["attention/query_norm"].grid("layer", "head").std(-1) > 0).all()


@pytest.mark.parametrize(("kind", "sight"), [("sdpa", "bound"), ("eager", "exact")])
def test_gpt2_with_tied_embeddings_and_dropout(kind: str, sight: str) -> None:
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        attn_implementation=kind,
    )  # fmt: skip
    client = Client(lambda: transformers.GPT2LMHeadModel(config), language_loss)
    client.assert_attention({f"transformer.h.{i}.attn": 4 for i in range(2)}, sight)
    client.assert_output("GPT2LMHeadModel")
    client.assert_activations("transformer.h.0", "transformer.h.1", stacks=["transformer.h"])
    client.assert_parameters()
    assert "lm_head.weight" not in client.trained and "transformer.wte.weight" in client.trained


def test_qwen3_with_normed_queries_and_keys() -> None:
    config = transformers.Qwen3Config(**SMALL, head_dim=8)
    client = Client(lambda: transformers.Qwen3ForCausalLM(config), language_loss)
    assert_decoder(client)
    client.assert_parameters()
    for name in ("query_norm", "key_norm"):  # seen behind the norm: sqrt(head size), while its weight is about 1
        np.testing.assert_allclose(client.history[f"attention/{name}"].values, 8**0.5, rtol=0.02)


class TestMixtral:
    """Four experts, one per token. Two of them are out of reach: whatever one router row says, its negative can
    answer louder, and one of the two is always above zero.
    """

    @staticmethod
    def build() -> nn.Module:
        config: Any = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1)
        model = transformers.MixtralForCausalLM(config)
        with torch.no_grad():
            for name, router in model.named_parameters():
                if name.endswith("gate.weight"):
                    router[0] *= 50
                    router[1] = -router[0]
                    router[2:] = 0
        return model

    def test_router_is_no_attention_and_idle_experts_show(self) -> None:
        client = Client(self.build, language_loss)
        assert_decoder(client)
        client.assert_parameters()
        experts = [name for name in client.trained if ".experts." in name]
        assert len(experts) == 4
        for name in experts:  # one tensor holds all experts: half of its gradient is zero, and nothing is ungraded
            np.testing.assert_allclose(client.of("gradient/zero_fraction", name), [0.5] * STEPS, atol=1e-3)


def test_gpt_oss_whose_softmax_takes_more_than_the_scores_is_told_as_unseen() -> None:
    """It joins a learnt sink to the scores and takes the row maximum off: what enters its softmax are no logits."""
    config = transformers.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager"
    )
    client = Client(lambda: transformers.GptOssForCausalLM(config), language_loss)
    assert not [name for name in client.history if name.startswith("attention/")]
    assert client.coverage("attention") == {"unseen": set(HEADS)}
    client.assert_output("GptOssForCausalLM")
    client.assert_activations(*LAYERS, stacks=["model.layers"])
    client.assert_parameters()
