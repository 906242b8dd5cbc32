"""Losses that never build logits are seen by what they are given, and count once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from tests.capture.test_losses import Sample, assert_numbers, truth
from tests.capture.test_window import installed
from traindiag.capture.names import watch
from traindiag.capture.taps import LossTap
from traindiag.capture.window import Capture
from traindiag.engine.diagnostics import Diagnostics
from traindiag.functional.output import choose_tokens
from traindiag.monitors.output import OutputMonitor
from traindiag.record.coverage import Coverage

CLASSES, WIDTH = 11, 6
TOLD = "logits are never built: up to 128 sampled tokens times {}"


class Fused(torch.autograd.Function):
    """Linear layer and mean cross-entropy in pieces; gradients are computed with the loss, as Liger does."""

    @staticmethod
    def forward(
        ctx: Any,
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        softcap: float | None = None,
    ) -> Tensor:
        count = (target != ignore_index).sum().clamp(min=1)
        loss, grad_input = _input.new_zeros(()), torch.empty_like(_input)
        grad_weight, grad_bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for rows in torch.arange(len(_input)).split(7):
            raw = _input[rows] @ weight.T if bias is None else _input[rows] @ weight.T + bias
            logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
            y = target[rows]
            loss += F.cross_entropy(logits, y, ce_weight, ignore_index=ignore_index, reduction="sum") / count
            grad = logits.softmax(-1) - F.one_hot(y.clamp(min=0), len(weight))
            grad = grad * (y != ignore_index)[:, None] / count
            if ce_weight is not None:
                grad = grad * ce_weight[y.clamp(min=0)][:, None]
            if softcap is not None:
                grad = grad * (1 - (logits / softcap) ** 2)
            grad_input[rows] = grad @ weight
            grad_weight += grad.T @ _input[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_input, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_input, grad_weight, grad_bias = ctx.saved_tensors
        of_bias = None if grad_bias is None else grad_bias * grad
        return grad_input * grad, grad_weight * grad, None, of_bias, None, None, None


fused_loss = Fused.apply
"""Taken before any window is open, as programs do."""


class Net(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=biased)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embed(ids)).tanh() * 3  # the last of it in no module

    def logits(self) -> Tensor:
        return self.head(self(IDS))


IDS = torch.randint(CLASSES, (24,), generator=torch.Generator().manual_seed(0))
Y = torch.randint(CLASSES, (24,), generator=torch.Generator().manual_seed(1))
IGNORED = Y.clone().index_fill(0, torch.arange(0, 24, 3), -100)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    gc.collect()
    yield
    assert "apply" not in vars(_SingleLevelFunction)
    assert installed() == (0, 0, 0)
    assert not nn_module._has_any_global_hook()


def fp64(net: Net) -> Tensor:
    """Full logits."""
    weight = net.head.weight.detach().double()
    bias = 0 if net.head.bias is None else net.head.bias.detach().double()
    return net(IDS).detach().double() @ weight.T + bias


def test_the_loss_of_these_tests_is_a_real_one() -> None:
    net = Net(biased=True)
    grads = []
    fused = fused_loss(net(IDS), net.head.weight, IGNORED, net.head.bias)
    for loss in (fused, F.cross_entropy(net.logits(), IGNORED)):
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


# -- outside of the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [Fused.apply, lambda *a: Fused.apply(*a)], ids=["taken before", "looked up"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("targets", [Y, IGNORED], ids=["all", "some ignored"])
def test_a_plain_model(call: Callable[..., Tensor], biased: bool, targets: Tensor) -> None:
    net = Net(biased)

    def step() -> None:
        bias = (net.head.bias,) if biased else ()
        call(net(IDS), net.head.weight, targets, *bias).backward()

    sample = Sample(net, step)
    assert sample.sites == ["step"]  # the cross-entropy of its pieces trains nothing
    assert_numbers(sample, truth(fp64(net), targets), "step")
    assert sample.coverage == (Coverage("output", "exact", ("step",), TOLD.format("head")),)


@pytest.mark.parametrize("biased", [False, True])
def test_other_arguments_are_told_apart_by_name(biased: bool) -> None:
    net = Net(biased)
    with torch.no_grad():
        net.head.weight.mul_(5)
    targets = Y.clone().index_fill(0, torch.arange(0, 24, 3), 3)
    class_weights = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2)) + 0.5

    def step() -> None:
        fused_loss(net(IDS), net.head.weight, targets, net.head.bias, class_weights, 3, 2.0).backward()

    logits = 2.0 * torch.tanh(fp64(net) / 2.0)
    assert_numbers(Sample(net, step), truth(logits, targets, ignore=3), "step")


def test_no_more_tokens_than_wanted_are_looked_at() -> None:
    net = Net()
    monitor = OutputMonitor(tokens=5)

    def step() -> None:
        fused_loss(net(IDS), net.head.weight, IGNORED)

    sample = Sample(net, step, tokens=5)
    chosen, targets = choose_tokens(fp64(net), IGNORED, tokens=5)
    assert (targets != -100).all() and len(targets) == 5
    assert_numbers(sample, truth(chosen, targets), "step")
    assert monitor.taps()[0].tokens == 5


def test_two_micro_batches_add_up_in_one_cell() -> None:
    net = Net()

    def training_step(i: int) -> None:
        fused_loss(net(IDS[i::2]), net.head.weight, IGNORED[i::2]).backward()

    sample = Sample(net, lambda: [training_step(i) for i in range(2)])
    assert sample.sites == ["training_step"] * 2
    assert_numbers(sample, truth(fp64(net), IGNORED), "training_step")


def test_a_tied_head_bears_the_name_of_the_layer() -> None:
    net = Net()
    net.head.weight = net.embed.weight
    sample = Sample(net, lambda: fused_loss(net(IDS), net.embed.weight, Y))
    assert [row.reason for row in sample.coverage] == [TOLD.format("head")]


@dataclass
class Parameters:
    targets: Tensor
    valids: Tensor
    shift: int
    batch_shape: torch.Size
    ignore_index: int


class Cut(torch.autograd.Function):
    """Takes targets inside a dataclass and shifts them itself, as cut cross-entropy does."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, c: Tensor, bias: Tensor | None, params: Parameters) -> Tensor:
        with torch.enable_grad():
            e, c = e.detach().requires_grad_(), c.detach().requires_grad_()
            z = (e[params.valids] @ c.T).log_softmax(-1)
            loss = -z[torch.arange(len(z)), params.targets[params.valids + params.shift]].mean()
        ctx.save_for_backward(*torch.autograd.grad(loss, (e, c)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(g * grad for g in ctx.saved_tensors), None, None


def test_targets_that_are_shifted_inside() -> None:
    net, y = Net(), IGNORED.view(4, 6)
    valids = torch.tensor([6 * b + t for b in range(4) for t in range(5) if y[b, t + 1] != -100], dtype=torch.int32)

    def step() -> None:
        Cut.apply(net(IDS), net.head.weight, None, Parameters(y.flatten(), valids, 1, y.shape, -100)).backward()

    logits = fp64(net).view(4, 6, CLASSES)[:, :-1].flatten(0, 1)
    assert_numbers(Sample(net, step), truth(logits, y[:, 1:].flatten()), "step")


def test_a_custom_operator() -> None:
    @torch.library.custom_op("traindiag_tests::fused", mutates_args=())
    def fused(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -(hidden @ weight.T).log_softmax(-1).gather(-1, target[:, None]).mean()

    fused.register_autograd(lambda ctx, grad: (torch.zeros(24, WIDTH), torch.zeros(CLASSES, WIDTH), None))
    net = Net()
    sample = Sample(net, lambda: fused(net(IDS), net.head.weight, Y).backward())
    assert_numbers(sample, truth(fp64(net), Y), sample.sites[0])


# -- it counts once, and only where it trains ----------------------------------------------------------


class InPieces(torch.autograd.Function):
    """Computes its pieces with torch's cross-entropy and its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        grads, loss = [torch.zeros_like(hidden), torch.zeros_like(weight)], torch.zeros(())
        for rows in torch.arange(len(hidden)).split(7):
            with torch.enable_grad():
                h, w = hidden[rows].detach().requires_grad_(), weight.detach().requires_grad_()
                piece = F.cross_entropy(h @ w.T, target[rows], reduction="sum") / len(hidden)
            of_h, of_w = torch.autograd.grad(piece, (h, w))
            grads[0][rows] = of_h
            grads[1] += of_w
            loss += piece.detach()
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(g * grad for g in ctx.saved_tensors), None


def test_pieces_that_are_seen_count_instead() -> None:
    net = Net()
    sample = Sample(net, lambda: InPieces.apply(net(IDS), net.head.weight, Y).backward())
    assert sample.sites == ["forward"] * 4
    assert_numbers(sample, truth(fp64(net), Y), "forward")
    assert sample.coverage == (Coverage("output", "exact", ("forward",)),)


class ByTransform(torch.autograd.Function):
    """Its pieces are computed inside torch.func, where tensors cannot be read."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy(h @ w.T, target)

        grads, value = torch.func.grad_and_value(loss, (0, 1))(hidden, weight)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(g * grad for g in ctx.saved_tensors), None


def test_pieces_that_cannot_be_read_are_no_gap() -> None:
    net = Net()

    def step() -> None:
        ByTransform.apply(net(IDS), net.head.weight, Y).backward()

    sample = Sample(net, step)
    assert sample.sites == ["step"]
    assert_numbers(sample, truth(fp64(net), Y), "step")
    assert sample.coverage == (Coverage("output", "exact", ("step",), TOLD.format("head")),)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    net = Net()

    def chunk(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fused_loss(hidden, weight, target)

    sample = Sample(net, lambda: checkpoint(chunk, net(IDS), net.head.weight, Y, use_reentrant=reentrant).backward())
    assert sample.sites == ["chunk"]
    assert_numbers(sample, truth(fp64(net), Y), "chunk")


def test_an_ordinary_loss_beside_the_head_is_one_cell() -> None:
    class Scale(torch.autograd.Function):
        """Something else that takes a weight, hidden states and whole numbers."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
            return hidden * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * 2, None, None

    net = Net()

    def step() -> None:
        F.cross_entropy(net.head(Scale.apply(net(IDS), net.head.weight, IDS)), Y).backward()

    sample = Sample(net, step)
    assert sample.sites == ["step"]
    assert sample.coverage == (Coverage("output", "exact", ("step",)),)


def test_weights_of_no_layer_are_no_head() -> None:
    """As of a loss that draws hidden states to the centres of classes."""

    class Centres(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, centres: Tensor, target: Tensor) -> Tensor:
            return (hidden - centres[target]).square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return None, None, None

    net = Net()
    net.centres = nn.Parameter(torch.randn(CLASSES, WIDTH))
    sample = Sample(net, lambda: Centres.apply(net(IDS), net.centres, Y))
    assert sample.sites == []
    (row,) = sample.coverage
    assert (row.sight, row.places) == ("unseen", ())
    assert row.reason == "no cross-entropy call was seen; name the head with OutputMonitor(head=...)"


def test_what_does_not_train_does_not_count() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = Net(), Net().requires_grad_(False)

    pair = Pair()

    def step() -> None:
        fused_loss(pair.teacher(IDS), pair.teacher.head.weight, Y)
        with torch.no_grad():
            fused_loss(pair.student(IDS), pair.student.head.weight, Y)
        fused_loss(pair.student(IDS), pair.student.head.weight, Y).backward()

    assert Sample(pair, step).sites == ["step"]


def test_not_a_bit_changes() -> None:
    def run(watched: bool) -> tuple[Any, ...]:
        torch.manual_seed(3)
        net = Net(biased=True)

        def step() -> Tensor:
            loss = fused_loss(F.dropout(net(IDS), 0.2), net.head.weight, IGNORED, net.head.bias)
            loss.backward()
            return loss

        loss = Sample(net, step).returned if watched else step()
        return loss, torch.get_rng_state(), *(p.grad for p in net.parameters())

    for without, with_window in zip(run(False), run(True), strict=True):
        assert torch.equal(without, with_window)


def test_two_windows_close_in_any_order() -> None:
    nets, sites = [Net(), Net()], []
    windows = []
    for i, net in enumerate(nets):
        window = Capture()
        watched = watch(net, torch.optim.SGD(net.parameters(), lr=0.1))
        window.prepare(watched, [LossTap(lambda call, i=i: sites.append((i, call.site)))])
        window.open()
        windows.append(window)

    def step() -> None:
        for net in nets:
            fused_loss(net(IDS), net.head.weight, Y)

    step()
    windows[0].close()
    step()
    windows[1].close()
    step()
    assert sites == [(0, "step"), (1, "step"), (1, "step")]


def test_another_thread_is_left_alone() -> None:
    net = Net()

    def step() -> None:
        thread = Thread(target=lambda: fused_loss(net(IDS), net.head.weight, Y))
        thread.start()
        thread.join()

    assert Sample(net, step).sites == []


def test_a_mistake_of_the_program_raises_as_it_would() -> None:
    net = Net()
    with pytest.raises(IndexError):
        Sample(net, lambda: fused_loss(net(IDS), net.head.weight, Y[:3]))


def test_a_weight_that_is_split_over_ranks_is_told() -> None:
    class Parallel(Fused):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, vocab_parallel_options: Any) -> Tensor:
            return Fused.forward(ctx, hidden, weight, target)

    net = Net()

    def step() -> None:
        Parallel.apply(net(IDS), net.head.weight, Y, object())

    sample = Sample(net, step)
    reason = "logits are never built, and the weight of head is split over ranks"
    assert sample.coverage == (Coverage("output", "unseen", ("step",), reason),)


# -- a head by name ------------------------------------------------------------------------------------


def test_a_head_by_name_that_is_not_called() -> None:
    net = Net()
    sample = Sample(net, lambda: fused_loss(net(IDS), net.head.weight, Y).backward(), head="head")
    assert sample.sites == ["head"]
    assert_numbers(sample, truth(fp64(net), Y), "head")
    assert sample.coverage == (Coverage("output", "exact", ("head",), TOLD.format("head")),)


def test_a_head_by_name_that_is_called_counts_once() -> None:
    net = Net()

    def step() -> None:
        net.logits()
        fused_loss(net(IDS), net.head.weight, Y).backward()

    assert Sample(net, step, head="head").sites == ["head"]


# -- a model of Hugging Face -----------------------------------------------------------------------------


def llama(**config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given, num_attention_heads=2, **config))
    nn.init.normal_(model.lm_head.weight)  # logits of some size
    return model


TEXT = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
LABELS = TEXT.clone().index_fill(1, torch.arange(7), -100)


def shifted_loss(hidden: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each token of the last dimension but the last one predicts the next, as Hugging Face has it."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return loss(hidden.reshape(-1, hidden.shape[-1]), targets.view(-1))


def patch(model: Any, loss: Callable[..., Tensor]) -> None:
    """As libraries of fused losses do: no logits where there are labels."""
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def lce_forward(self: Any, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        if not (self.training and labels is not None):
            return outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))
        value = shifted_loss(hidden, labels, lambda h, y: loss(h, self.lm_head.weight, y))
        return outputs.CausalLMOutputWithPast(loss=value)

    model.forward = MethodType(lce_forward, model)


def full(model: Any) -> tuple[Tensor, Tensor]:
    """Full logits ``[n, classes]`` in fp64 and their targets."""
    with torch.no_grad():
        hidden = model.model(input_ids=TEXT).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden.double() @ model.lm_head.weight.detach().double().T, LABELS[:, 1:].flatten()


def of_a_copy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The weight is one that no module has, so the call alone does not say that it is a head's."""
    return fused_loss(hidden, weight.clone(), target)


@pytest.mark.parametrize("loss", [fused_loss, of_a_copy], ids=["by its call", "by what the model does"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_model_that_skips_its_head(loss: Callable[..., Tensor], micro_batches: int) -> None:
    model = llama()
    patch(model, loss)

    def step() -> None:
        for rows in torch.arange(2).chunk(micro_batches):
            model(input_ids=TEXT[rows], labels=LABELS[rows]).loss.backward()

    sample = Sample(model, step)
    # the forward of one model is replaced, not that of its class: then a call bears the name of its function
    site = "shifted_loss" if loss is fused_loss else "LlamaForCausalLM"
    assert sample.sites == [site] * micro_batches
    assert_numbers(sample, truth(*full(model)), site)
    assert sample.coverage == (Coverage("output", "exact", (site,), TOLD.format("lm_head")),)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # older ones know no other name
def test_the_forward_of_its_class_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    patch(model, fused_loss)
    monkeypatch.setattr(type(model), "forward", model.__dict__.pop("forward").__func__)
    model.gradient_checkpointing_enable()
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward())
    assert sample.sites == ["LlamaForCausalLM"]
    assert_numbers(sample, truth(*full(model)), "LlamaForCausalLM")


def test_a_model_of_an_encoder_and_a_decoder() -> None:
    """Its decoder scales what the head is given: only the call itself says by how much."""
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0,
    )
    model, seen = transformers.T5ForConditionalGeneration(config), []

    def patched(loss: Callable[..., Tensor]) -> Any:
        def forward(self: Any, input_ids: Tensor, labels: Tensor) -> Any:
            states = self.encoder(input_ids=input_ids).last_hidden_state
            given = self._shift_right(labels)
            hidden = self.decoder(input_ids=given, encoder_hidden_states=states).last_hidden_state.flatten(0, 1) / 4
            seen.append(hidden.detach().double() @ self.lm_head.weight.detach().double().T)
            return outputs.Seq2SeqLMOutput(loss=loss(hidden, self.lm_head.weight, labels.flatten()))

        return MethodType(forward, model)

    model.forward = patched(fused_loss)
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward())
    assert len(sample.sites) == 1
    assert_numbers(sample, truth(seen[-1], LABELS.flatten()), sample.sites[0])
    model.forward = patched(of_a_copy)
    assert Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward()).sites == []


def test_evaluation_of_it_does_not_count() -> None:
    model = llama()
    patch(model, of_a_copy)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=TEXT, labels=LABELS)

    assert Sample(model, step).sites == []


def test_the_same_model_as_it_comes_is_one_cell() -> None:
    model = llama()
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward())
    assert sample.sites == ["LlamaForCausalLM"]
    assert sample.coverage == (Coverage("output", "exact", ("LlamaForCausalLM",)),)


@pytest.mark.parametrize("loss", [fused_loss, of_a_copy])
def test_a_head_of_it_by_name(loss: Callable[..., Tensor]) -> None:
    model = llama()
    patch(model, loss)
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward(), head="lm_head")
    assert sample.sites == ["lm_head"]
    assert_numbers(sample, truth(*full(model)), "lm_head")


@pytest.mark.parametrize("loss", [fused_loss, of_a_copy])
def test_not_a_bit_of_it_changes(loss: Callable[..., Tensor]) -> None:
    def run(watched: bool) -> tuple[Any, ...]:
        model = llama(attention_dropout=0.2)
        patch(model.train(), loss)

        def step() -> Tensor:
            value = model(input_ids=TEXT, labels=LABELS).loss
            value.backward()
            return value

        value = Sample(model, step).returned if watched else step()
        return value, torch.get_rng_state(), *(p.grad for p in model.parameters() if p.grad is not None)

    for without, with_window in zip(run(False), run(True), strict=True):
        assert torch.equal(without, with_window)


def test_scale_and_softcap_of_the_configuration() -> None:
    model = llama(final_logit_softcapping=2.0, logit_scale=0.25)
    patch(model, of_a_copy)
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss)
    logits, targets = full(model)
    assert_numbers(sample, truth(2.0 * torch.tanh(logits * 0.25 / 2.0), targets), "LlamaForCausalLM")


def test_labels_of_another_shape_are_no_targets() -> None:
    model = llama()
    patch(model, lambda h, w, y: of_a_copy(h, w, LABELS.flatten()))
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS.flatten()).loss)
    hidden = model.model(input_ids=TEXT).last_hidden_state.flatten(0, 1).double()
    assert_numbers(sample, truth(hidden @ model.lm_head.weight.double().T, None), "LlamaForCausalLM")
    reason = TOLD.format("lm_head") + "; no target z-score, because targets are not known"
    assert [row.reason for row in sample.coverage] == [reason]


class Other(Tensor):
    pass


OTHER = nn.Parameter(torch.zeros(50, 16).as_subclass(Other))


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (nn.Parameter(torch.zeros(3)), "the weight of lm_head is not whole here"),
        (OTHER, f"tensors of type {type(OTHER).__name__} are not looked into"),
    ],
)
def test_a_head_whose_weight_is_elsewhere_is_told(weight: nn.Parameter, why: str) -> None:
    """As where it is sharded."""
    model = llama()
    true = model.lm_head.weight
    patch(model, lambda h, _, y: fused_loss(h, true, y))
    model.lm_head.weight = weight
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS))
    reason = f"logits are never built, and {why}"
    assert sample.coverage == (Coverage("output", "unseen", ("LlamaForCausalLM",), reason),)


def test_logits_that_are_built_are_not_computed_again() -> None:
    """The head is called, and the loss is somebody's kernel."""
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = llama()

    def forward(self: Any, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        return outputs.CausalLMOutputWithPast(loss=logits.logsumexp(-1).mean(), logits=logits)

    model.forward = MethodType(forward, model)
    assert Sample(model, lambda: model(input_ids=TEXT, labels=LABELS)).sites == []
    assert Sample(model, lambda: model(input_ids=TEXT, labels=LABELS), head="lm_head").sites == ["lm_head"]


def test_a_model_without_a_head_is_told() -> None:
    body = llama().model
    sample = Sample(body, lambda: fused_loss(body(TEXT).last_hidden_state[:, 0], torch.randn(50, 16), TEXT[:, 0]))
    assert sample.sites == []
    (row,) = sample.coverage
    assert row.reason == "no cross-entropy call was seen; name the head with OutputMonitor(head=...)"


# -- loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
def test_loops(attached: bool) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    options: dict[str, Any] = {"every_n_steps": 2, "terminal": False, "strict": True, "max_overhead": None}
    diagnostics = (Diagnostics.attach if attached else Diagnostics)(net, optimizer, **options)
    patched, expected = [], []

    def train() -> None:
        expected.append(fp64(net)[IGNORED != -100].logsumexp(-1).mean().item())
        optimizer.zero_grad()
        hidden = net(IDS)
        patched.append("apply" in vars(_SingleLevelFunction))
        fused_loss(hidden, net.head.weight, IGNORED).backward()
        optimizer.step()

    for _ in range(4):
        if attached:
            train()
        else:
            with diagnostics.step():
                train()
    diagnostics.finish()
    series = diagnostics.history["output/log_z"]
    assert patched == [True, False] * 2
    assert [str(c) for c in series.cells] == ["train"]
    assert series.values[:, 0].tolist() == pytest.approx([expected[0], expected[2]], rel=1e-4)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("loss", [fused_loss, of_a_copy])
def test_loops_of_a_model_that_skips_its_head(attached: bool, loss: Callable[..., Tensor]) -> None:
    model = llama()
    patch(model, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"every_n_steps": 2, "terminal": False, "strict": True, "max_overhead": None}
    diagnostics = (Diagnostics.attach if attached else Diagnostics)(model, optimizer, **options)
    expected, hooks = [], []

    def train() -> None:
        logits, targets = full(model)
        expected.append(logits[targets != -100].logsumexp(-1).mean().item())
        model(input_ids=TEXT, labels=LABELS).loss.backward()
        hooks.append(len(model._forward_hooks))
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        if attached:
            train()
        else:
            with diagnostics.step():
                train()
    diagnostics.finish()
    series = diagnostics.history["output/log_z"]
    assert len(series.cells) == 1
    assert series.values[:, 0].tolist() == pytest.approx([expected[0], expected[2]], rel=1e-4)
    assert [c.reason for c in diagnostics.coverage if c.family == "output"] == [TOLD.format("lm_head")]
    assert hooks[0] == hooks[1] + 1 == hooks[2] == hooks[3] + 1  # none of ours where nothing is sampled


# -- beside compiled code: last, because some of it outlives its test --------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # torch itself
def test_compiled_code_that_calls_one_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    net = Net()
    compiled = torch.compile(lambda h, w: Fused.apply(h * 2, w, Y), backend=backend)
    compiled(net(IDS), net.head.weight)
    before = len(graphs)
    Sample(net, lambda: compiled(net(IDS), net.head.weight).backward())
    compiled(net(IDS), net.head.weight)
    assert len(graphs) == before


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # compiling looks at it
def test_beside_a_compiled_loss() -> None:
    torch._dynamo.reset()
    model = llama()
    compiled = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.T, y), backend="aot_eager")
    patch(model, compiled)
    sample = Sample(model, lambda: model(input_ids=TEXT, labels=LABELS).loss.backward())
    assert sample.sites == ["LlamaForCausalLM"]
    assert_numbers(sample, truth(*full(model)), "LlamaForCausalLM")


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:.*should not be instantiated")  # torch itself
def test_a_compiled_model_is_looked_at_in_its_second_pass() -> None:
    torch._dynamo.reset()
    model = llama()
    patch(model, fused_loss)
    compiled = torch.compile(model, backend="aot_eager")
    sample = Sample(model, lambda: compiled(input_ids=TEXT, labels=LABELS).loss.backward())
    assert len(sample.sites) == 1
    assert_numbers(sample, truth(*full(model)), sample.sites[0])
