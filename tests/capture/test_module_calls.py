"""What modules return is shown once, detached, under their names, and nothing else of the run changes."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.capture.test_attention_styles import GPT, tokens
from tests.capture.test_window import installed
from traindiag.capture.coverage import SHADOW
from traindiag.capture.names import watch
from traindiag.capture.outputs import activation_of, features_last
from traindiag.capture.taps import ModuleCall, ModuleTap
from traindiag.capture.window import Capture

BLOCKS = ["blocks.0", "blocks.1"]


def capture(
    model: nn.Module, modules: Sequence[str], observe: Callable[[ModuleCall], None]
) -> tuple[Capture, Sequence[str]]:
    window = Capture()
    trained = [p for p in model.parameters() if p.requires_grad]
    window.prepare(watch(model, torch.optim.SGD(trained, lr=0.1)), [ModuleTap(modules, observe)])
    return window, modules


def coverage(window: Capture, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {c.reason or c.sight: c.places for c in window.module_coverage("activation", modules)}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_block_once_and_not_in_the_recomputation(reentrant: bool | None) -> None:
    model, seen = GPT(checkpointing=reentrant), []
    window, names = capture(model, BLOCKS, lambda call: seen.append((call.layer, call.output.square().mean())))
    truth: list[Tensor] = []
    begun: list[nn.Module] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, _: begun.append(m))
        block.register_forward_hook(lambda m, i, o: truth.append(o.detach().square().mean()))
    assert coverage(window, names) == {"not sampled yet": tuple(BLOCKS)}
    window.open()
    loss = model(tokens(grad=True))
    loss.backward()  # not announced
    window.close()
    assert [n for n, _ in seen] == BLOCKS
    assert [v for _, v in seen] == truth[:2]
    assert len(begun) == (2 if reentrant is None else 4), "it was recomputed"
    assert coverage(window, names) == {"exact": tuple(BLOCKS)}
    assert installed() == (0, 0, 0)


def test_detached_and_out_of_reach_of_modes() -> None:
    class Own(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    called: list[Any] = []
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), tokens()

    def observe(call: ModuleCall) -> None:
        assert not call.output.requires_grad and not torch.is_grad_enabled()
        call.output.cumsum(0)

    window, _ = capture(model, ["0", "2"], observe)
    with Own():
        model(x)
        without = list(called)
        called.clear()
        window.open()
        model(x)
        window.close()
    assert called == without


def test_only_what_trains_between_open_and_close() -> None:
    model, x, seen = GPT(), tokens(), []
    window, _ = capture(model, BLOCKS, lambda call: seen.append(call.layer))
    model(x)
    window.open()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    window.pause()
    model(x)
    assert seen == []
    window.resume()
    model(x)
    model(x)
    window.close()
    model(x)
    assert seen == BLOCKS * 2


def test_keeps_no_activation() -> None:
    references: list[weakref.ref[Tensor]] = []
    model = GPT()
    window, _ = capture(model, BLOCKS, lambda call: references.append(weakref.ref(call.output)))
    window.open()
    model(tokens()).sum()
    gc.collect()
    assert [r() for r in references] == [None, None]
    window.close()


def test_a_forward_pass_that_breaks() -> None:
    class Breaks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("broken")

    model, seen = nn.Sequential(nn.Linear(2, 2), Breaks(2, 2)), []
    window, names = capture(model, ["0", "1"], lambda call: seen.append(call.layer))
    window.open()
    with pytest.raises(KeyError):
        model(torch.ones(1, 2))
    window.close()
    assert seen == ["0"]
    assert installed() == (0, 0, 0)
    assert coverage(window, names)["exact"] == ("0",)


def test_what_the_tap_raises_reaches_the_caller() -> None:
    def observe(call: ModuleCall) -> None:
        raise ArithmeticError(call.layer)

    model = GPT()
    window, _ = capture(model, BLOCKS, observe)
    window.open()
    with pytest.raises(ArithmeticError, match=r"blocks\.0"):
        model(tokens())
    window.close()
    assert installed() == (0, 0, 0)


def test_compiled_parts_are_seen_in_a_second_pass() -> None:
    model, seen = GPT(), []
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
    window, names = capture(model, BLOCKS, lambda call: seen.append(call.layer))
    for _ in range(2):
        window.open()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(tokens()).backward()
        window.close()
    assert seen == ["blocks.0", "blocks.1"] * 2
    assert coverage(window, names) == {"exact": ("blocks.0",), SHADOW: ("blocks.1",)}


def test_modules_that_cannot_be_read_are_told() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.mask = nn.Linear(2, 2), nn.Linear(2, 2), Mask(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) * self.mask(x)

    class Mask(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x > 0

    model = Idle()
    window, names = capture(model, ["used", "unused", "mask"], lambda call: None)
    window.open()
    model(torch.ones(1, 2))
    window.close()
    assert coverage(window, names) == {
        "exact": ("used",),
        "did not return in a training forward pass": ("unused",),
        "returns no floating-point tensor of two or more dimensions": ("mask",),
    }


def test_functional_transforms_are_left_alone() -> None:
    model, seen = nn.Sequential(nn.Linear(2, 2)), []
    window, names = capture(model, ["0"], lambda call: seen.append(call.layer))
    window.open()
    torch.func.vmap(model)(torch.ones(3, 1, 2))
    window.close()
    assert seen == []
    assert coverage(window, names) == {"returns a Tensor, which is not read": ("0",)}


@dataclass
class Result:
    loss: Tensor
    hidden: Tensor


X = torch.ones(2, 3)
NOT = (torch.tensor(1.0), torch.ones(4), torch.ones(2, 2, dtype=torch.long), None, "text")


@pytest.mark.parametrize(
    "output",
    [X, (X,), [X, X + 1], (*NOT, X), {"a": NOT, "b": X}, Result(torch.tensor(0.0), X), ((NOT,), (X, (X + 1,)))],
)
def test_the_first_tensor_that_can_be_an_activation(output: object) -> None:
    assert activation_of(output) is X


@pytest.mark.parametrize("output", [*NOT, NOT, {}, (), Result, X.to(torch.complex64), object()])
def test_no_activation(output: object) -> None:
    assert activation_of(output) is None


def test_packed_sequences_and_recurrent_layers() -> None:
    memory = nn.LSTM(4, 5, batch_first=True)
    padded = memory(torch.ones(2, 3, 4))
    assert activation_of(padded) is padded[0]
    packed = memory(nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 4), torch.tensor([3, 2]), batch_first=True))
    assert activation_of(packed) is packed[0].data


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(3, 4, 3), (2, 4, 5, 6), (2, 5, 6, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 4, 5, 6), (2, 5, 6, 4)),
        (nn.Conv1d(3, 4, 3), (2, 4, 5), (2, 5, 4)),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), (2, 4, 5), (2, 5, 4)),
        (nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)), (2, 4, 5), (2, 4, 5)),  # as in Conformer
        (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5)), (2, 3, 4, 5), (2, 3, 4, 5)),  # as in Swin
        (nn.BatchNorm1d(4), (2, 4), (2, 4)),
        (nn.LSTM(3, 4), (2, 3, 4), (2, 3, 4)),
    ],
)
def test_features_are_last(module: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert features_last(module, torch.ones(shape)).shape == expected


def test_checkpointing_inside_a_block() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    model, seen = Outer(), []
    window, _ = capture(model, ["a", "b", "Outer"], lambda call: seen.append(call.layer))
    window.open()
    model(torch.ones(1, 4)).sum().backward()
    window.close()
    assert seen == ["a", "b", "Outer"]
