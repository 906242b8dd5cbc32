"""Models made of torch's own layers, with a loss outside of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.clients.run import LENGTH, PADDING, Client, classes, noise, text


def next_token_loss(model: nn.Module, step: int) -> Tensor:
    tokens = text(step, length=LENGTH + 1)
    loss: Tensor = nn.CrossEntropyLoss()(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(24, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


def test_lstm() -> None:
    client = Client(Recurrent, next_token_loss)
    client.assert_no_attention()
    client.assert_output("next_token_loss")
    client.assert_activations("embedding", "lstm", "head")
    client.assert_parameters()
    assert "lstm.weight_hh_l1" in client.trained


def test_convnet_with_batch_norm() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip

    def image_loss(model: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(model(noise(step, 4, 3, 16, 16)), classes(step, 4, 5))

    client = Client(build, image_loss)
    client.assert_no_attention()
    client.assert_output("image_loss")
    client.assert_activations("0", "1", "3", "7")
    client.assert_parameters()
    for mine, theirs in zip(client.run.model.buffers(), client.alone.model.buffers(), strict=True):
        assert torch.equal(mine, theirs)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        layer = nn.TransformerEncoderLayer(16, nhead=4, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(16, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=PADDING == 0)
        logits: Tensor = self.head(hidden)
        return logits


def test_transformer_encoder_with_padding_and_dropout() -> None:
    client = Client(Encoder, next_token_loss)
    client.assert_attention({f"encoder.layers.{i}.self_attn": 4 for i in range(2)}, "bound")
    client.assert_output("next_token_loss")
    client.assert_activations("encoder.layers.0", "encoder.layers.1", stacks=["encoder.layers"])
    client.assert_parameters()
