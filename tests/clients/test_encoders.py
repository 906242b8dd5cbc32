"""Encoders from transformers: padded text, and images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.clients.run import PADDING, Client, classes, noise, text

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT_LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")
BERT_HEADS = dict.fromkeys((f"{layer}.attention.self" for layer in BERT_LAYERS), 4)


def padded_labels(step: int) -> Tensor:
    return text(step).masked_fill(PADDING == 0, -100)


@pytest.mark.parametrize(("kind", "sight"), [("sdpa", "bound"), ("eager", "exact")])
def test_bert_with_padding_and_dropout(kind: str, sight: str) -> None:
    config = transformers.BertConfig(vocab_size=256, **SMALL, attn_implementation=kind)

    def loss(model: nn.Module, step: int) -> Tensor:
        found: Tensor = model(input_ids=text(step), attention_mask=PADDING, labels=padded_labels(step)).loss
        return found

    client = Client(lambda: transformers.BertForMaskedLM(config), loss)
    client.assert_attention(BERT_HEADS, sight)
    client.assert_output("BertForMaskedLM")
    client.assert_activations(*BERT_LAYERS, stacks=["bert.encoder.layer"])
    client.assert_parameters()


def test_bert_with_heads_that_the_loss_does_not_use() -> None:
    config = transformers.BertConfig(vocab_size=256, **SMALL)

    def masked_language_loss(model: nn.Module, step: int) -> Tensor:
        logits = model(input_ids=text(step), attention_mask=PADDING).prediction_logits
        return F.cross_entropy(logits.flatten(0, 1), padded_labels(step).flatten())

    client = Client(lambda: transformers.BertForPreTraining(config), masked_language_loss)
    client.assert_attention(BERT_HEADS, "bound")
    client.assert_output("masked_language_loss")
    unused = [
        f"{place}.{kind}" for place in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")
    ]
    client.assert_parameters(without_gradient=unused)


def test_vit() -> None:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)

    def loss(model: nn.Module, step: int) -> Tensor:
        found: Tensor = model(pixel_values=noise(step, 4, 3, 16, 16), labels=classes(step, 4, 5)).loss
        return found

    client = Client(lambda: transformers.ViTForImageClassification(config), loss)
    client.assert_attention({f"vit.layers.{i}.attention": 4 for i in range(2)}, "bound")
    client.assert_output("ViTForImageClassification")
    client.assert_activations("vit.layers.0", "vit.layers.1", stacks=["vit.layers"])
    client.assert_parameters()


def test_resnet_is_seen_block_by_block_and_has_no_attention() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24], depths=[2, 2, 2], num_labels=5, layer_type="basic"
    )

    def loss(model: nn.Module, step: int) -> Tensor:
        found: Tensor = model(pixel_values=noise(step, 4, 3, 32, 32), labels=classes(step, 4, 5)).loss
        return found

    client = Client(lambda: transformers.ResNetForImageClassification(config), loss)
    client.assert_no_attention()
    client.assert_output("ResNetForImageClassification")
    stages = [f"resnet.encoder.stages.{i}.layers" for i in range(3)]
    client.assert_activations(*(f"{stage}.{i}" for stage in stages for i in range(2)), stacks=stages)
    client.assert_parameters()
    zero = client.history["activation/zero_fraction"].values
    assert (zero > 0.01).all() and (zero < 0.9).all()  # behind a ReLU
    buffers = [dict(run.model.named_buffers()) for run in (client.run, client.alone)]
    assert buffers[0].keys() and all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[1])
