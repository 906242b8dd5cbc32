"""Cross-entropy is seen however it is spelt, under a name that stays, and only where it trains."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    handle_torch_function,
    has_torch_function_unary,
)
from torch.utils.checkpoint import checkpoint

from tests.capture.test_window import installed
from traindiag.capture.names import watch
from traindiag.capture.taps import LossCall, LossTap
from traindiag.capture.window import Capture
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.engine.diagnostics import Diagnostics
from traindiag.monitors.output import OutputMonitor
from traindiag.record.coverage import Coverage
from traindiag.transfer.states import Reduced

CLASSES = 11


class Net(nn.Module):
    """Logits ``[24, 11]`` of nothing in particular."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(5, 6), nn.Linear(6, classes)

    def hidden(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.hidden(x))


X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(CLASSES, (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    gc.collect()


class Sample:
    """One sampled step: calls by site and the monitor's numbers by signal and site."""

    def __init__(self, model: nn.Module, step: Callable[[], Any], *, head: str | None = None, **kw: Any) -> None:
        monitor = OutputMonitor(head=head, **kw)
        self.sites: list[str] = []

        def observe(call: LossCall) -> None:
            self.sites.append(call.site)
            for tensor in (call.logits, call.targets, call.hidden, call.weight):
                assert tensor is None or not tensor.requires_grad
            monitor.taps()[0].observe(call)

        self.capture, before = Capture(), installed()
        self.capture.prepare(watch(model, torch.optim.SGD(model.parameters(), lr=0.1)), [LossTap(observe, head)])
        self.capture.open()
        try:
            self.returned = step()
        finally:
            self.capture.close()
        assert installed() == before
        self.numbers = read(monitor)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        return self.capture.output_coverage()


def read(monitor: OutputMonitor) -> dict[str, dict[str, float]]:
    """Numbers by signal and site, None where not seen, as one rank alone computes them."""
    found: dict[str, dict[str, float]] = {}
    groups = {}
    for group in monitor.collect():
        n = len(group.cells)
        groups[group.name] = Reduced(
            group.cells,
            np.ones(n, bool),
            {k: v.double().numpy() for k, v in group.sums.items()},
            {k: v.numpy() for k, v in group.maxima.items()},
            {k: np.zeros(n, np.int64) for k in group.maxima},
        )
    for reading in monitor.readings(groups):
        at = found.setdefault(reading.signal.name.split("/")[1], {})
        for (site,), value, seen in zip(reading.cells.coordinates, reading.values, reading.seen, strict=True):
            at[site] = float(value) if seen else None
    return found


def truth(logits: Tensor, targets: Tensor | None, ignore: int = -100) -> dict[str, float | None]:
    """Of ``[n, classes]``, in numpy and fp64."""
    z = logits.detach().double().numpy()
    y = None if targets is None else targets.numpy()
    if y is not None:
        z, y = z[y != ignore], y[y != ignore]
    log_z = np.log(np.exp(z).sum(1))
    score = None
    if y is not None:
        score = float(np.mean([(row[k] - row.mean()) / row.std() for row, k in zip(z, y, strict=True)]))
    return {
        "log_z": log_z.mean(),
        "log_z_max_abs": np.abs(log_z).max(),
        "z_loss": (log_z**2).mean(),
        "logit_mean": z.mean(),
        "logit_max": z.max(),
        "logit_min": z.min(),
        "target_z_score": score,
        "overconfidence": None if y is None else float(np.mean(_surprise(z, y) - _entropy(z))),
    }


def _surprise(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))[np.arange(len(y)), y]


def _entropy(z: np.ndarray) -> np.ndarray:
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1)


def assert_numbers(sample: Sample, expected: dict[str, float | None], site: str, rel: float = 1e-4) -> None:
    assert {k: v[site] for k, v in sample.numbers.items()} == {
        k: v if v is None else pytest.approx(v, rel=rel, abs=rel) for k, v in expected.items()
    }


# -- every spelling --------------------------------------------------------------------------------

SMOOTH = {"label_smoothing": 0.1}
WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2)) + 0.5


def functional(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


def imported(z: Tensor) -> Tensor:
    return cross_entropy(z, target=Y, reduction="sum")


def keywords(z: Tensor) -> Tensor:
    return F.cross_entropy(input=z, target=Y, **SMOOTH)


def weighted(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y, WEIGHT, reduction="none").sum()


def module(z: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(weight=WEIGHT, **SMOOTH)(z, Y)


def kernel(z: Tensor) -> Tensor:
    return torch._C._nn.cross_entropy_loss(z, Y, None, 1, -100, 0.0)


def in_two(z: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z, dim=-1), Y)


def in_two_of_torch(z: Tensor) -> Tensor:
    return torch._C._nn.nll_loss_nd(torch.log_softmax(z, 1), Y, None, 1, -100)


def in_two_of_the_tensor(z: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(1), Y)


def in_two_modules(z: Tensor) -> Tensor:
    return nn.NLLLoss()(nn.LogSoftmax(dim=1)(z), Y)


def in_two_by_a_view(z: Tensor) -> Tensor:
    return F.nll_loss(z.view(4, 6, CLASSES).log_softmax(-1).view(24, CLASSES), Y)


def in_two_transposed(z: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z.view(4, 6, CLASSES), dim=-1).transpose(1, 2), Y.view(4, 6))


def longer(z: Tensor) -> Tensor:
    return F.cross_entropy(z.view(4, 6, CLASSES).transpose(1, 2), Y.view(4, 6))


def longest(z: Tensor) -> Tensor:
    return F.cross_entropy(z.view(2, 3, 4, CLASSES).movedim(-1, 1).contiguous(), Y.view(2, 3, 4))


def inside_a_lambda(z: Tensor) -> Tensor:
    return (lambda: sum([F.cross_entropy(z, Y) for _ in range(1)]))()


SPELLINGS = [
    functional, imported, keywords, weighted, module, kernel, in_two, in_two_of_torch, in_two_of_the_tensor,
    in_two_modules, in_two_by_a_view, in_two_transposed, longer, longest, inside_a_lambda,
]  # fmt: skip


@pytest.mark.parametrize("loss", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_spelling(loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    if dtype != torch.float32 and loss in (weighted, module):
        pytest.skip("class weights have the dtype of the logits")
    sample = Sample(net, lambda: loss(net(X.to(dtype))))
    assert sample.sites == [loss.__name__]
    assert_numbers(sample, truth(net(X.to(dtype)), Y), loss.__name__)
    assert sample.coverage == (Coverage("output", "exact", (loss.__name__,)),)


def test_one_token_alone() -> None:
    net = Net()

    def step() -> Tensor:
        return F.cross_entropy(net(X[0]), Y[0]) + F.nll_loss(F.log_softmax(net(X[1]), 0), Y[1])

    sample = Sample(net, step)
    assert sample.sites == ["step", "step#2"]
    assert_numbers(sample, truth(net(X[:1]), Y[:1]), "step")
    assert_numbers(sample, truth(net(X[1:2]), Y[1:2]), "step#2")


@pytest.mark.parametrize("ignore", [-100, 3])
def test_ignored_tokens_do_not_count(ignore: int) -> None:
    net, targets = Net(), Y.clone()
    targets[::3] = ignore
    sample = Sample(net, lambda: functional_with(net(X), targets, ignore))
    assert_numbers(sample, truth(net(X), targets, ignore), "functional_with")


def functional_with(z: Tensor, y: Tensor, ignore: int) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=ignore)


def test_class_probabilities_have_no_target() -> None:
    net, soft = Net(), F.one_hot(Y, CLASSES).float() * 0.8 + 0.2 / CLASSES

    def step() -> Tensor:
        return F.cross_entropy(net(X), soft)

    sample = Sample(net, step)
    assert_numbers(sample, truth(net(X), None), "step")
    (row,) = sample.coverage
    assert (row.sight, row.reason) == ("exact", "no target z-score, because targets are class probabilities")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="a newer torch has it")
@pytest.mark.parametrize("biased", [False, True])
def test_a_loss_that_builds_no_logits(biased: bool) -> None:
    net, targets = Net(), Y.clone()
    targets[::3] = -100

    def step() -> Tensor:
        bias = net.lm_head.bias if biased else None
        return F.linear_cross_entropy(net.hidden(X), net.lm_head.weight, targets, linear_bias=bias)

    sample = Sample(net, step)
    logits = net.hidden(X) @ net.lm_head.weight.T + (net.lm_head.bias if biased else 0)
    assert_numbers(sample, truth(logits, targets), "step")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="a newer torch has it")
def test_several_losses_a_token_without_logits_are_told() -> None:
    net, weight = Net(), nn.Parameter(torch.randn(CLASSES, 2, 6))

    def step() -> Tensor:
        return F.linear_cross_entropy(net.hidden(X), weight, Y[:, None].expand(-1, 2).contiguous())

    (row,) = Sample(net, step).coverage
    assert (row.sight, row.places) == ("unseen", ("step",))
    assert row.reason == "linear_cross_entropy with more than one loss a token"


def test_a_binary_loss_is_no_head() -> None:
    net = Net()
    sample = Sample(net, lambda: F.binary_cross_entropy_with_logits(net(X), torch.zeros(24, CLASSES)))
    assert sample.sites == [] and sample.numbers == {}
    (row,) = sample.coverage
    assert (row.sight, row.places) == ("unseen", ())
    assert row.reason == "no cross-entropy call was seen; name the head with OutputMonitor(head=...)"


def test_log_probabilities_from_elsewhere_are_told() -> None:
    net = Net()

    def step() -> Tensor:
        return F.nll_loss(net(X).softmax(-1).log(), Y)

    (row,) = Sample(net, step).coverage
    assert (row.sight, row.places) == ("unseen", ("step",))
    assert row.reason == "nll_loss of numbers that no log_softmax was seen to make"


def test_logits_that_changed_after_the_log_softmax_are_not_taken_for_them() -> None:
    net = Net()

    def step() -> Tensor:
        logits = net(X)
        found = F.log_softmax(logits, -1)
        logits.data.mul_(100)  # what autograd does not need again
        with torch.no_grad():
            logits.add_(1)
        return F.nll_loss(found, Y)

    assert Sample(net, step).sites == []


def test_a_mistake_of_the_program_raises_as_it_would() -> None:
    net = Net()
    with pytest.raises(ValueError, match="Expected input batch_size"):
        Sample(net, lambda: F.cross_entropy(net(X), Y[:3]))
    with pytest.raises(IndexError, match="out of bounds"):
        Sample(net, lambda: F.cross_entropy(net(X), Y + CLASSES))


# -- names of call sites ---------------------------------------------------------------------------


def test_call_sites_are_numbered_and_keep_their_numbers() -> None:
    net, seen = Net(), []
    capture = Capture()
    watched = watch(net, torch.optim.SGD(net.parameters(), lr=0.1))
    capture.prepare(watched, [LossTap(lambda call: seen.append(call.site))])

    def training_step(first: bool = True) -> None:
        if first:
            F.cross_entropy(net(X), Y)
        for _ in range(2):
            F.cross_entropy(net(X), Y)

    for first in (True, False, True):
        capture.open()
        training_step(first)
        capture.close()
    one, two = ["training_step"], ["training_step#2"] * 2
    assert seen == [*one, *two, *two, *one, *two]


def test_micro_batches_add_up_in_one_cell() -> None:
    net = Net()

    def training_step(i: int) -> None:
        F.cross_entropy(net(X[i::3]), Y[i::3]).backward()

    sample = Sample(net, lambda: [training_step(i) for i in range(3)])
    assert sample.sites == ["training_step"] * 3
    assert_numbers(sample, truth(net(X), Y), "training_step")


def test_a_loss_inside_of_a_module_bears_its_name() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.criterion(self.net(x), y) + F.cross_entropy(self.net(x), y)

        def training_step(self) -> Tensor:
            return self.criterion(self.net(X), Y) + F.cross_entropy(self.net(X), Y)

    model = WithLoss()
    assert Sample(model, lambda: model(X, Y)).sites == ["criterion", "WithLoss"]
    assert Sample(model, model.training_step).sites == ["criterion", "training_step"]


def test_a_wrapper_that_runs_another_method_does_not_change_the_name() -> None:
    """As Lightning does under DDP: forward is replaced for one call, and names must not depend on the strategy."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, x: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), Y)

    module = Module()
    module.forward = module.training_step
    assert Sample(module, lambda: module(X)).sites == ["training_step"]


def test_a_loss_module_of_the_program_is_looked_into() -> None:
    class Loss(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(z, Y)

    net, loss = Net(), Loss()
    sample = Sample(net, lambda: loss(net(X)))
    assert_numbers(sample, truth(net(X), Y), *sample.sites)


# -- only what trains ------------------------------------------------------------------------------


def test_teachers_and_evaluation_do_not_count() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = Net(), Net().requires_grad_(False)

    pair = Pair()

    def step() -> Tensor:
        F.cross_entropy(pair.teacher(X), Y)
        F.nll_loss(pair.teacher(X).log_softmax(-1), Y)
        with torch.no_grad():
            F.cross_entropy(pair.student(X), Y)
        F.cross_entropy(pair.student(X).detach(), Y)
        soft = pair.teacher(X).softmax(-1)
        return F.cross_entropy(pair.student(X), soft)

    sample = Sample(pair, step)
    assert sample.sites == ["step"]
    assert_numbers(sample, truth(pair.student(X), None), "step")


def test_a_teacher_beside_the_model_keeps_its_fast_path() -> None:
    net, depths = Net(), []
    teacher = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()
    teacher.requires_grad_(False).layers[0].register_forward_pre_hook(lambda *_: depths.append(installed()[2]))

    def step() -> None:
        with torch.no_grad():
            teacher(torch.randn(2, 3, 8))
            depths.append(installed()[2])
        F.cross_entropy(net(X), Y)

    assert Sample(net, step).sites == ["step"]
    assert depths == [0, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_loss_counts_once(reentrant: bool) -> None:
    net, x = Net(), X.clone().requires_grad_()

    def chunk(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), Y)

    def step() -> None:
        checkpoint(chunk, x, use_reentrant=reentrant).backward()

    assert Sample(net, step).sites == ["chunk"]


# -- the window between modules --------------------------------------------------------------------


@pytest.mark.parametrize("loss", [functional, in_two, longer])
def test_not_a_bit_changes_and_nothing_is_kept(loss: Callable[[Tensor], Tensor]) -> None:
    def run(watched: bool) -> tuple[Any, ...]:
        torch.manual_seed(3)
        net = Net()

        def step() -> Tensor:
            value = loss(F.dropout(net(X), 0.2))
            value.backward()
            return value

        value = Sample(net, step).returned if watched else step()
        return value, torch.get_rng_state(), *(p.grad for p in net.parameters())

    for without, with_window in zip(run(False), run(True), strict=True):
        assert torch.equal(without, with_window)


def test_logits_that_no_loss_asks_for_are_let_go_before_backward() -> None:
    net, held = Net(), []
    window = Capture()
    window.prepare(watch(net, torch.optim.SGD(net.parameters(), lr=0.1)), [LossTap(lambda call: None)])

    def look(_: Any = None) -> None:
        held.append(len(window._losses._log_softmaxes))

    window.open()
    for announced in (False, True):
        logits = net(X)
        logits.register_hook(look)
        loss = F.kl_div(F.log_softmax(logits, -1), torch.full((24, CLASSES), 0.1), reduction="sum")
        look()
        if announced:
            window.pause()
        loss.backward()
        window.resume()
    window.close()
    assert held == [1, 0, 1, 0]


def test_modes_of_the_program_keep_their_place_between_modules() -> None:
    class Own(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    net = Net()
    sites: list[str] = []
    window = Capture()
    tap = LossTap(lambda call: sites.append(call.site))
    window.prepare(watch(net, torch.optim.SGD(net.parameters(), lr=0.1)), [tap])
    with Own() as outer:
        window.open()
        with Own() as inner:
            window.pause()
            window.resume()  # between the two blocks of the program, which pop what is on top
            functional(net(X))
            assert _get_current_function_mode_stack()[-2:] == [outer, inner]
        functional(net(X))
        window.pause()
    window.resume()
    functional(net(X))
    window.pause()
    with torch.device("cpu"):
        window.resume()
        functional(net(X))
    functional(net(X))
    window.close()
    assert _get_current_function_mode_stack() == []
    assert sites == ["functional"] * 5


def test_a_default_device_stays_the_lowest() -> None:
    net, sites = Net(), []
    window = Capture()
    tap = LossTap(lambda call: sites.append(call.site))
    window.prepare(watch(net, torch.optim.SGD(net.parameters(), lr=0.1)), [tap])
    torch.set_default_device("cpu")
    try:
        window.open()
        functional(net(X))
        torch.set_default_device("cpu")
        functional(net(X))
    finally:
        torch.set_default_device(None)
    functional(net(X))
    window.close()
    assert _get_current_function_mode_stack() == []
    assert sites == ["functional"] * 3


def test_a_step_that_ends_inside_of_its_backward_pass() -> None:
    """As where the optimizer steps in backward: what happens to the mode there, autograd undoes."""
    net = Net()
    window = Capture()
    window.prepare(watch(net, torch.optim.SGD(net.parameters(), lr=0.1)), [LossTap(lambda call: None)])
    net.body.weight.register_post_accumulate_grad_hook(lambda _: window.close())
    window.open()
    functional(net(X)).backward()
    window.close()
    assert installed() == (0, 0, 0)


def through(x: Tensor, module: nn.Module) -> Tensor:
    """A function of the program that modes see, as those of torch; a module runs in it."""
    if has_torch_function_unary(x):
        return handle_torch_function(through, (x,), x, module)
    return module(x)


def test_modules_inside_of_a_call_that_the_mode_hands_on() -> None:
    net = Net()

    def step() -> Tensor:
        through(X, net)
        return F.cross_entropy(net(X), Y)

    assert Sample(net, step).sites == ["step"]  # not twice


def test_beside_compiled_parts_it_does_not_look_between_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fast = Net(), torch.compile(nn.Linear(5, 5), backend="eager")

    model = Two()
    sample = Sample(model, lambda: functional(model.net(X)))
    assert sample.sites == []
    reason = "parts of the program are compiled: losses outside of eager modules are not looked at"
    assert sample.coverage == (Coverage("output", "unseen", (), reason),)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # compiling looks at it
def test_a_compiled_function_is_not_recompiled() -> None:
    torch._dynamo.reset()
    net, compiled = Net(), torch.compile(functional, backend="eager")
    graphs: list[int] = []

    def step() -> None:
        compiled(net(X))
        graphs.append(len(_get_current_function_mode_stack()))

    sample = Sample(net, step)
    assert sample.sites == [] and graphs == [0]
    assert [c.sight for c in sample.coverage] == ["unseen"]


# -- a head by name --------------------------------------------------------------------------------


def test_a_head_by_name() -> None:
    net = Net()

    def step() -> Tensor:
        with torch.no_grad():
            net(X * 9)
        return F.cross_entropy(net(X), Y) + net(X).logsumexp(-1).mean()

    sample = Sample(net, step, head="lm_head")
    assert sample.sites == ["lm_head", "lm_head"]
    assert_numbers(sample, truth(net(X), None), "lm_head")
    (row,) = sample.coverage
    assert (row.sight, row.places) == ("exact", ("lm_head",))


def test_a_head_that_is_never_called() -> None:
    """A fused loss takes the weight of the head and leaves the module alone."""
    net = Net()
    sample = Sample(net, lambda: (net.hidden(X) @ net.lm_head.weight.T).logsumexp(-1).sum(), head="lm_head")
    reason = "it was not called in a training step: its logits are not built there"
    assert sample.coverage == (Coverage("output", "unseen", ("lm_head",), reason),)


def test_a_head_that_gives_no_logits() -> None:
    class Tuple(Net):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),)

    net = Tuple()
    (row,) = Sample(net, lambda: net(X), head="Tuple").coverage
    assert row.reason == "expected a tensor of logits as its output, got tuple"


def test_a_head_that_is_not_there_lists_near_ones() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"head='lm_haed' is no module that is being trained\. Did you mean 'lm_head'"
    ):
        Diagnostics(net, optimizer, terminal=False, monitors=[OutputMonitor(head="lm_haed")])


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        OutputMonitor(tokens=0)
    with pytest.raises(ValueError, match="neither logits nor hidden and weight"):
        OutputMonitor().taps()[0].observe(LossCall("a"))


# -- what the monitor makes of it ------------------------------------------------------------------


def test_absent_is_not_nan_and_nan_is_not_absent() -> None:
    monitor = OutputMonitor()
    observe = monitor.taps()[0].observe
    ignored, targets = torch.full((2,), -100), torch.zeros(2, dtype=torch.long)
    masked = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 1.0, 2.0]])
    observe(LossCall("ignored", torch.zeros(2, 3), ignored))
    observe(LossCall("broken", masked.nan_to_num(0).index_fill(1, torch.tensor(0), math.nan), targets))
    observe(LossCall("masked", masked, targets))
    observe(LossCall("constant", torch.zeros(2, 3), targets))
    numbers = read(monitor)
    assert all(values["ignored"] is None for values in numbers.values())
    assert all(math.isnan(values["broken"]) for values in numbers.values())
    ruled_out = {name for name, values in numbers.items() if values["masked"] is None}
    assert ruled_out == {"logit_min", "logit_mean", "target_z_score"}
    assert numbers["log_z"]["masked"] == pytest.approx(masked.logsumexp(1).mean().item())
    assert [name for name, values in numbers.items() if values["constant"] is None] == ["target_z_score"]
    assert monitor.collect() == ()


@pytest.mark.parametrize("shift", [-30.0, 50.0])
def test_a_shift_moves_log_z_and_nothing_that_is_learnt(shift: float) -> None:
    net = Net()
    before = Sample(net, lambda: functional(net(X))).numbers
    with torch.no_grad():
        net.lm_head.bias += shift
    after = Sample(net, lambda: functional(net(X))).numbers
    site = "functional"
    assert after["log_z"][site] - before["log_z"][site] == pytest.approx(shift, abs=1e-4)
    assert after["target_z_score"][site] == pytest.approx(before["target_z_score"][site], abs=1e-4)


# -- loops -----------------------------------------------------------------------------------------


def batch(seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(256, (2, 16), generator=source), torch.randint(256, (2, 16), generator=source)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loops_without_lightning(attached: bool, accumulate: int) -> None:
    model = GPT(GPTConfig(layers=1, width=16, heads=2, context=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"every_n_steps": 2, "terminal": False, "strict": True, "max_overhead": None}
    make = Diagnostics.attach if attached else Diagnostics
    diagnostics = make(model, optimizer, **options)
    expected: list[Tensor] = []
    in_updates: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: in_updates.append(installed()[2]))

    def train(step: int) -> None:
        for micro in range(accumulate):
            tokens, targets = batch(step * accumulate + micro)
            logits = model(tokens)
            expected.append(logits.detach())
            next_token_loss(logits, targets)[0].backward()
        if step:
            model.eval()
            with torch.no_grad():
                next_token_loss(model(tokens), targets)
            model.train()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(4):
        if attached:
            train(step)
        else:
            with diagnostics.step():
                train(step)
    diagnostics.finish()
    assert installed() == (0, 0, 0)
    assert not attached or in_updates == [0] * 4
    series = diagnostics.history["output/log_z"]
    assert [str(c) for c in series.cells] == ["next_token_loss"]
    assert series.steps.tolist() == [0, 2]
    for row, step in enumerate((0, 2)):
        logits = torch.cat(expected[step * accumulate : (step + 1) * accumulate]).flatten(0, 1)
        assert series.values[row, 0] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-4)
    assert {c.sight for c in diagnostics.coverage if c.family == "output"} == {"exact"}


def test_an_attached_loop_that_breaks_leaves_no_mode() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ArithmeticError

    net = Breaks()
    diagnostics = Diagnostics.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), terminal=False)
    with pytest.raises(ArithmeticError):
        net(X)
    assert installed() == (0, 0, 0)
    diagnostics.detach()


def test_a_model_that_computes_its_own_loss_under_attach() -> None:
    class WithLoss(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(super().forward(x), Y)

    net = WithLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    diagnostics = Diagnostics.attach(net, optimizer, terminal=False, strict=True, every_n_steps=1)
    for _ in range(2):
        for _ in range(2):
            net(X).backward()
        optimizer.step()
    diagnostics.detach()
    assert [str(c) for c in diagnostics.history["output/log_z"].cells] == ["WithLoss"]


# -- models that are not ours ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_models_with_labels(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        )
    else:
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                                    attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0)
        )  # fmt: skip
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :7] = -100
    sample = Sample(model, lambda: model(input_ids=ids, labels=labels).logits)
    assert sample.sites == [type(model).__name__]
    logits = sample.returned[:, :-1].reshape(-1, 50)
    assert_numbers(sample, truth(logits, labels[:, 1:].flatten()), type(model).__name__)
    assert sample.coverage == (Coverage("output", "exact", (type(model).__name__,)),)
