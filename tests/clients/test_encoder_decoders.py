"""Encoder-decoders from transformers: cross attention, position bias, experts in a list, frozen positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.clients.run import PADDING, STEPS, Client, noise, text

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
         "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
BLOCKS = ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
HEADS = {
    "encoder.block.0.layer.0.SelfAttention": 4,
    "encoder.block.1.layer.0.SelfAttention": 4,
    "decoder.block.0.layer.0.SelfAttention": 4,
    "decoder.block.0.layer.1.EncDecAttention": 4,
    "decoder.block.1.layer.0.SelfAttention": 4,
    "decoder.block.1.layer.1.EncDecAttention": 4,
}


def translation_loss(model: nn.Module, step: int) -> Tensor:
    labels = text(step + 100, length=10)
    loss: Tensor = model(input_ids=text(step), attention_mask=PADDING, labels=labels).loss
    return loss


@pytest.mark.parametrize(("kind", "sight"), [("sdpa", "bound"), ("eager", "exact")])
def test_t5_with_position_bias(kind: str, sight: str) -> None:
    config = transformers.T5Config(**SMALL, attn_implementation=kind)
    client = Client(lambda: transformers.T5ForConditionalGeneration(config), translation_loss)
    client.assert_attention(HEADS, sight)
    client.assert_output("T5ForConditionalGeneration")
    client.assert_activations(*BLOCKS, stacks=["encoder.block", "decoder.block"])
    client.assert_parameters()


class TestSwitchTransformers:
    """Four experts, two of them out of reach of the router, each with tensors of its own."""

    @staticmethod
    def build() -> nn.Module:
        config: Any = transformers.SwitchTransformersConfig(
            **SMALL, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0
        )
        model = transformers.SwitchTransformersForConditionalGeneration(config)
        with torch.no_grad():
            for name, router in model.named_parameters():
                if name.endswith("router.classifier.weight"):
                    router[0] *= 50
                    router[1] = -router[0]
                    router[2:] = 0
        return model

    def test_router_is_no_attention_and_idle_experts_are_ungraded(self) -> None:
        client = Client(self.build, translation_loss)
        client.assert_attention(HEADS, "exact")
        client.assert_activations(*BLOCKS, stacks=["encoder.block", "decoder.block"])
        idle = {name for name in client.trained if "expert_2" in name or "expert_3" in name}
        assert len(idle) == 8  # two experts of two tensors in either half
        assert idle == {n for n in client.trained if all(n not in t.gradients for t in client.truth)}
        client.assert_parameters(without_gradient=sorted(idle))


def test_whisper() -> None:
    config = transformers.WhisperConfig(
        vocab_size=256, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip

    def loss(model: nn.Module, step: int) -> Tensor:
        found: Tensor = model(input_features=noise(step, 4, 8, 32), labels=text(step, length=12)).loss
        return found

    client = Client(lambda: transformers.WhisperForConditionalGeneration(config), loss)
    decoder = {f"model.decoder.layers.{i}.{kind}": 2 for i in range(2) for kind in ("self_attn", "encoder_attn")}
    client.assert_attention({f"model.encoder.layers.{i}.self_attn": 4 for i in range(2)} | decoder, "bound")
    client.assert_output("WhisperForConditionalGeneration")
    blocks = [f"model.{half}.layers.{i}" for half in ("encoder", "decoder") for i in range(2)]
    client.assert_activations(*blocks, stacks=["model.encoder.layers", "model.decoder.layers"])
    client.assert_parameters(frozen=["model.encoder.embed_positions.weight"])
    assert len(client.of("wiring/frozen_changed", "model.encoder.embed_positions.weight")) == STEPS - 1
