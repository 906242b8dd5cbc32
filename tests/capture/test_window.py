"""The window changes nothing, keeps nothing, and leaves nothing behind; only what trains is seen."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tests.capture.test_attention_styles import GPT, NAMES, Attention, EagerModule, tokens
from traindiag.capture.names import watch
from traindiag.capture.taps import AttentionCall, AttentionTap
from traindiag.capture.window import Capture
from traindiag.monitors.attention import AttentionMonitor


def capture(model: nn.Module, seen: list[str] | None = None, monitor: AttentionMonitor | None = None) -> Capture:
    monitor = monitor or AttentionMonitor(rows=2)

    def observe(call: AttentionCall) -> None:
        if seen is not None:
            seen.append(call.layer)
        monitor.taps()[0].observe(call)

    window = Capture()
    window.prepare(watch(model, torch.optim.SGD(model.parameters(), lr=0.1)), [AttentionTap(observe)])
    return window


def installed() -> tuple[int, int, int]:
    return (
        len(nn_module._global_forward_pre_hooks),
        len(nn_module._global_forward_hooks),
        len(_get_current_function_mode_stack()),
    )


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.mix = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.q(x), x, x)[0]


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize(
    "attention", [Attention, EagerModule, MultiHead, lambda: Attention(dropout_p=0.2)],
    ids=["fused", "eager", "multi-head", "dropout"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neutral(attention: Any, checkpointing: bool | None, dtype: torch.dtype) -> None:
    def run(watched: bool) -> tuple[Any, ...]:
        model, x = GPT(attention, checkpointing=checkpointing), tokens(grad=True)
        window = capture(model)
        torch.manual_seed(7)
        if watched:
            window.open()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(x)
        window.pause()
        loss.backward()
        window.close()
        return loss, x.grad, torch.get_rng_state(), *(p.grad for p in model.parameters())

    for without, with_window in zip(run(False), run(True), strict=True):
        assert torch.equal(without, with_window)


@pytest.mark.parametrize("attention", [Attention, EagerModule, MultiHead])
def test_keeps_no_activation(attention: Any) -> None:
    class Scored(nn.Module):
        """Makes a product that no softmax takes up."""

        def __init__(self) -> None:
            super().__init__()
            self.attn, self.out = attention(), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.out(self.attn(x))
            references.append(weakref.ref(y))
            return (y @ y.mT).sum()

    references: list[weakref.ref[Tensor]] = []
    model, monitor = Scored(), AttentionMonitor(rows=2)
    window = capture(model, monitor=monitor)
    window.open()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: torch.zeros(())):
        model(tokens())
    gc.collect()
    assert references[0]() is None
    for state in monitor.collect()[0].maxima.values():
        assert state.untyped_storage().nbytes() <= 16
        assert state.grad_fn is None
    window.close()


def test_cleans_up_after_an_exception() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            self.attn(x)
            raise error

    before = installed()
    error: BaseException
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        model, seen = Breaks(), []
        window = capture(model, seen)
        window.open()
        assert installed() == (before[0] + 1, before[1] + 1, before[2])
        with pytest.raises(type(error)):
            model(tokens())
        window.close()
        window.close()
        assert installed() == before
        assert seen == ["attn"]
        model.attn(tokens())
        window.open()
        model.attn(tokens())
        window.close()
        assert seen == ["attn", "attn"]


def test_an_exception_in_a_multi_head_call_puts_functions_back() -> None:
    model = MultiHead()
    window = capture(model)
    before = F.softmax, F.scaled_dot_product_attention, torch.bmm, torch.baddbmm
    window.open()
    with pytest.raises((RuntimeError, AssertionError)):
        model.mix(tokens(), tokens()[:, :3], tokens())
    assert installed()[2] == 0
    window.close()
    assert (F.softmax, F.scaled_dot_product_attention, torch.bmm, torch.baddbmm) == before


def test_only_between_open_and_close_and_not_while_paused() -> None:
    model, x, seen = GPT(), tokens(), []
    window = capture(model, seen)
    model(x)
    window.resume()
    model(x)
    assert seen == []
    window.open()
    window.open()
    window.pause()
    model(x)
    assert seen == []
    window.resume()
    model(x)
    assert seen == NAMES
    window.close()
    model(x)
    assert seen == NAMES
    assert window.forward_order[:4] == ("GPT", "blocks.0", "blocks.0.norm", "blocks.0.attn")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_seen_even_where_backward_was_not_announced(reentrant: bool) -> None:
    model, seen = GPT(checkpointing=reentrant), []
    window = capture(model, seen)
    depths: list[int] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: depths.append(installed()[2]))
    window.open()
    model(tokens(grad=True)).backward()
    window.close()
    assert seen == NAMES
    assert depths == [1, 0]


def test_several_backward_passes_inside_one_forward() -> None:
    """Manual optimization under a wrapper: the step itself is the forward pass of the outermost module."""

    class Manual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = GPT()

        def forward(self, x: Tensor) -> None:
            for _ in range(2):
                loss = self.net(x)
                window.pause()
                loss.backward()
                window.resume()

    model, seen = Manual(), []
    window = capture(model, seen)
    window.open()
    model(tokens())
    window.close()
    assert seen == ["net." + n for n in NAMES] * 2
    assert installed()[2] == 0


def test_no_grad_passes_teachers_and_evaluation_are_not_seen() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.net = GPT().requires_grad_(False), GPT()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) - self.teacher(x)

    model, seen = Student(), []
    window = Capture()
    watched = watch(model, torch.optim.SGD(model.net.parameters(), lr=0.1))
    window.prepare(watched, [AttentionTap(lambda call: seen.append(call.layer))])
    depths: set[int] = set()
    handle = model.net.blocks[0].mlp.register_forward_pre_hook(lambda *_: depths.add(installed()[2]))
    window.open()
    with torch.no_grad():
        model.net(tokens())
    model.eval()
    with torch.inference_mode():
        model(tokens())
    assert seen == []
    assert depths == {0}
    handle.remove()
    model.train()
    model(tokens()).backward()
    window.close()
    assert seen == ["net." + n for n in NAMES]
    assert not any(n.startswith("teacher") for c in window.coverage() for n in c.places)


def test_a_frozen_teacher_keeps_its_fast_path() -> None:
    """The fast path of Transformer layers is off under any function mode, which changes the last bits."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 1).requires_grad_(False).eval()

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.attn = teacher, Attention()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x)
                depth.append(len(_get_current_function_mode_stack()))
            return (self.attn(x) - target).square().mean()

    depth: list[int] = []
    inside: list[int] = []
    teacher.layers[0].register_forward_pre_hook(lambda *_: inside.append(installed()[2]))
    model = Student()
    window = Capture()
    window.prepare(watch(model, torch.optim.SGD(model.attn.parameters(), lr=0.1)), [])
    window.open()
    model(tokens())
    window.close()
    assert inside == [0]
    assert depth == [1]


def test_modes_of_the_program_keep_their_place() -> None:
    class Own(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.frozen = nn.Linear(16, 16).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with Own() as own:
                x = self.frozen(x)
                assert _get_current_function_mode_stack()[-1] is own
                return self.attn(x)

    model, seen = Model(), []
    window = Capture()
    watched = watch(model, torch.optim.SGD(model.attn.parameters(), lr=0.1))
    window.prepare(watched, [AttentionTap(lambda call: seen.append(call.layer))])
    window.open()
    with Own() as outer:
        model(tokens())
        assert _get_current_function_mode_stack() == [outer]
    window.close()
    assert seen == ["attn"]
    assert installed()[2] == 0


def test_what_the_tap_raises_reaches_the_caller() -> None:
    model, window = GPT(), Capture()

    def observe(call: AttentionCall) -> None:
        raise ArithmeticError(call.layer)

    window.prepare(watch(model, torch.optim.SGD(model.parameters(), lr=0.1)), [AttentionTap(observe)])
    window.open()
    with pytest.raises(ArithmeticError, match=r"blocks\.0\.attn"):
        model(tokens())
    window.close()
    assert installed()[2] == 0
