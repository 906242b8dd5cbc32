"""Which modules stand for the depth of a model, under which names."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from traindiag.capture.blocks import Stack, block_stacks, layers_with_parameters, parameter_blocks, stacks_of
from traindiag.capture.names import watch
from traindiag.capture.watched import Watched
from traindiag.demo.model import GPT, GPTConfig
from traindiag.engine.run_facts import run_facts


def watched(model: nn.Module, patterns: str | list[str] = "*") -> Watched:
    return watch(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), patterns)


def stack(name: str, count: int, first: int = 0) -> Stack:
    return Stack(name, tuple(f"{name}.{i}" for i in range(first, first + count)))


def gpt() -> nn.Module:
    return GPT(GPTConfig(layers=3, width=16, heads=2, context=16))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.ViTModel(config)


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.T5Model(
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=4)
    )


def resnet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[2, 3, 2], layer_type="basic")
    )


def mixture() -> nn.Module:
    """More experts in a block than blocks, and the first block is dense, as in some large models."""

    class Block(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.attn = nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(experts))

    return nn.ModuleDict({"layers": nn.ModuleDict({str(i): Block(5 if i else 1) for i in range(3)})})


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)})


def wrapped() -> nn.Module:
    model = gpt()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[2] = torch.compile(model.blocks[2], backend="eager")
    return nn.DataParallel(model)


def perceptron() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "head": nn.Linear(4, 1)})


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (gpt, [stack("blocks", 3)]),
        (llama, [stack("model.layers", 3)]),
        (gpt2, [stack("transformer.h", 2)]),
        (vit, None),
        (t5, [stack("encoder.block", 3), stack("decoder.block", 3)]),
        (resnet, [stack(f"encoder.stages.{i}.layers", n) for i, n in enumerate((2, 3, 2))]),
        (mixture, [stack("layers", 3)]),
        (torch_encoder, [stack("encoder.layers", 3)]),
        (wrapped, [stack("blocks", 3)]),
        (partial(nn.LSTM, 4, 4, num_layers=2), []),
        (perceptron, [stack("layers", 3)]),
        (lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), []),
        (lambda: nn.ModuleList(nn.Dropout() for _ in range(5)).append(nn.Linear(1, 1)), []),
    ],
)  # fmt: skip
def test_stacks(build, expected) -> None:
    model = build()
    found = block_stacks(watched(model))
    if expected is None:  # the name differs between versions
        (only,) = found
        assert len(only.blocks) == 2 and only.blocks[0].endswith(".0")
        assert only.blocks[0] == f"{only.name}.0"
        return
    assert list(found) == expected
    depth = run_facts(watched(model), [model]).depth
    assert depth == max((len(s.blocks) for s in expected), default=None)


def test_one_block_called_many_times_is_no_stack() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert stacks_of(nn.ModuleList([shared] * 6)) == []


def test_the_same_blocks_in_two_places_are_one_stack() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    model = nn.ModuleDict({"a": nn.ModuleDict({"blocks": blocks}), "b": nn.ModuleDict({"blocks": blocks})})
    assert block_stacks(watched(model)) == (stack("a.blocks", 2),)


def test_only_what_is_watched() -> None:
    assert block_stacks(watched(gpt(), "blocks.[12]")) == (stack("blocks", 2, first=1),)
    assert block_stacks(watched(gpt(), "*.mlp")) == ()
    teacher = gpt()
    model = nn.ModuleDict({"teacher": copy.deepcopy(teacher).requires_grad_(False), "student": teacher})
    assert block_stacks(watched(model)) == (stack("student.blocks", 3),)


def test_names_of_several_models() -> None:
    models = {"actor": gpt(), "critic": gpt()}
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.1) for n, m in models.items()}
    found = block_stacks(watch(models, optimizers))
    assert found == (stack("actor.blocks", 3), stack("critic.blocks", 3))


def test_layers_of_a_model_without_blocks() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))  # the model itself is no layer
            self.conv = nn.Conv2d(3, 4, 3)
            self.act = nn.ReLU()
            self.mix = nn.MultiheadAttention(4, 2)
            self.bound = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.memory = nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert layers_with_parameters(watched(Mixed()), at_most=9) == ("conv", "mix", "bound", "memory")
    assert layers_with_parameters(watched(nn.Linear(1, 1)), at_most=9) == ("Linear",)
    long = nn.Sequential(*(m for i in range(100) for m in (nn.Linear(i + 1, i + 2), nn.ReLU())))
    few = layers_with_parameters(watched(long), at_most=5)
    assert few == ("0", "50", "100", "148", "198")
    assert layers_with_parameters(watched(long), at_most=1) == ("0",)


def of_parameters(model: nn.Module, patterns: str = "*") -> list[str]:
    """Blocks of the parameters, each once, in the order of the model."""
    return list(dict.fromkeys(parameter_blocks(watched(model, patterns)).values()))


GPT_BLOCKS = ["token_embedding", "position_embedding", *(f"blocks.{i}" for i in range(3)), "final_norm", "head"]


class Alone(nn.Module):
    """What a framework's module or a task wrapper puts around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (gpt, GPT_BLOCKS),
        (lambda: Alone(perceptron()), ["net.layers.0", "net.layers.1", "net.layers.2", "net.head"]),
        (llama, ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]),
        # the head is the embedding, and bears its name
        (gpt2, ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]),
        (mixture, ["layers.0", "layers.1", "layers.2"]),
        (wrapped, GPT_BLOCKS),
        (lambda: Alone(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))), ["net.0", "net.2"]),
        (lambda: Alone(nn.Linear(1, 1)), ["net"]),
        (lambda: nn.Linear(1, 1), ["weight", "bias"]),
    ],
)  # fmt: skip
def test_the_block_of_each_parameter(build, expected) -> None:
    assert of_parameters(build()) == expected


def test_the_block_of_a_parameter_whether_it_is_watched_or_not() -> None:
    assert of_parameters(gpt(), "blocks.1") == of_parameters(gpt())
    frozen = gpt()
    frozen.blocks[0].requires_grad_(False)
    assert of_parameters(frozen) == [b for b in of_parameters(gpt()) if b != "blocks.0"]


def test_the_block_of_a_parameter_that_no_model_holds() -> None:
    copies = [p.detach().clone().requires_grad_() for p in gpt().parameters()]
    found = parameter_blocks(watch(gpt(), torch.optim.SGD(copies, lr=0.1)))
    assert set(found.values()) == {"SGD"} and len(found) == len(copies)


def test_the_blocks_of_several_models() -> None:
    models = {"actor": gpt(), "critic": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))}
    optimizers = {n: torch.optim.SGD(m.parameters(), lr=0.1) for n, m in models.items()}
    found = set(parameter_blocks(watch(models, optimizers)).values())
    assert found == {*(f"actor.{b}" for b in of_parameters(gpt())), "critic"}
