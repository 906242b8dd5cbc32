"""Models whose attention is not ours: layer names, grouped queries, padding, position bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.capture.oracle import Sample, assert_brackets, scale_up, true_logits

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(2, 40, dtype=torch.long).index_put((torch.tensor(1), torch.arange(25, 40)), torch.tensor(0))


def llama(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=kind,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    scale_up(model, 24, "q_proj", "k_proj")
    return model, lambda m: m(IDS).last_hidden_state.square().mean(), [f"layers.{i}.self_attn" for i in (0, 1)]


def gpt2(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_implementation=kind, attn_pdrop=0,
        resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2Model(config)
    scale_up(model, 26, "c_attn")
    return model, lambda m: m(IDS).last_hidden_state.square().mean(), ["h.0.attn", "h.1.attn"]


def bert(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=kind, attention_probs_dropout_prob=0, hidden_dropout_prob=0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False)
    scale_up(model, 30, "query.weight", "key.weight")
    names = [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    return model, lambda m: m(IDS, attention_mask=PADDED).last_hidden_state.square().mean(), names


def t5(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0, attn_implementation=kind,
    )  # fmt: skip
    model = transformers.T5Model(config)
    scale_up(model, 4, ".q.", ".k.")
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    for i in (0, 1):
        names += [f"decoder.block.{i}.layer.0.SelfAttention", f"decoder.block.{i}.layer.1.EncDecAttention"]

    def forward(m: nn.Module) -> Tensor:
        return m(input_ids=IDS, attention_mask=PADDED, decoder_input_ids=IDS).last_hidden_state.square().mean()

    return model, forward, names


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, gpt2, bert, t5])
def test_every_layer_is_seen_under_its_name(build, kind: str) -> None:
    torch.manual_seed(0)
    model, forward, names = build(kind)
    model.train()
    with true_logits() as truths:
        forward(model)
    sample = Sample(model, lambda: forward(model), rows=4)
    assert sample.layers == names
    assert all((t > 15).all() for t in truths), truths
    assert_brackets(sample, truths)
    if kind == "eager":
        for name, truth in zip(names, truths, strict=True):
            torch.testing.assert_close(sample.of("max_logit", name), truth, rtol=1e-6, atol=0)
    assert {c.sight for c in sample.coverage} == {"exact" if kind == "eager" else "bound"}
    assert sorted(n for c in sample.coverage for n in c.places) == sorted(names)


def test_flex_attention_is_told_and_left_alone() -> None:
    model, _, names = llama("sdpa")
    model.config._attn_implementation = "flex_attention"
    sample = Sample(model, lambda: model.layers[0].mlp(torch.randn(2, 4, 32)).sum())
    assert sample.layers == []
    (row,) = sample.coverage
    assert (row.sight, row.places) == ("unseen", tuple(names))
    assert row.reason == "flex_attention attention shows neither queries nor scores"
