"""A rehearsal: a few training steps on one batch, after which the model is what it was."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from traindiag.capture import torch_private
from traindiag.capture.blocks import block_stacks
from traindiag.capture.outputs import activation_of
from traindiag.capture.taps import LossCall, LossTap, Tap
from traindiag.capture.untouched import untouched
from traindiag.capture.watched import Watched
from traindiag.engine.diagnostics import Diagnostics, Optimizers
from traindiag.engine.settings import Settings
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.wiring import WiringMonitor
from traindiag.panels.preflight import print_preflight
from traindiag.record.frame import Frame, Reading
from traindiag.record.preflight import Cost, Finding, Preflight
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History
from traindiag.rules.alive import StructuralZeros
from traindiag.rules.rule import Rule
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded
from traindiag.rules.wording import names_of
from traindiag.transfer.ranks import rank
from traindiag.transfer.states import Group, Reduced

Loss = Callable[[Any, Any], Tensor]

STEPS = 16
_CADENCE = 4
"""The first step tells no time, and three samples follow, for a median. The step after a sample judges it: more than
one other must lie between two samples for the median to be that of an idle step."""

LOSS_MARGIN = 0.75
"""Nats between the first loss and the logarithm of the number of classes. Logits of standard deviation s that know
nothing add s^2 / 2: 0.17 under PyTorch's default initialisation of the head, 0.5 under one of unit variance, and half
of that again is left to the batch."""

GROWTH = 0.1
"""A growth exponent at initialisation that is told: OLMo-0424, which was unstable, had 0.09 to 0.12 and OLMo 2, which
is not, -0.03 (arXiv 2501.00656 section 3.2)."""

DEEP = 8
"""Blocks from which on it is told: in a shallower stack a single block decides, and healthy ones pass the limit."""


def preflight(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizers,
    *,
    loss: Loss | None = None,
    steps: int = STEPS,
    every_n_steps: int = 10,
    show: bool = True,
) -> Preflight:
    """Rehearses training on one batch and tells what is wired wrongly, seen, and large before the run begins.

    The steps are taken on the model itself, and everything is put back bit for bit, also when something raises:
    parameters, buffers, gradients, optimizer state, random states, modes. The first step gives the values, the
    others the cost. A model in evaluation mode is rehearsed in training mode. With several ranks all of them have to
    call it. What rules and panels take is not in the cost.

    Args:
        model: The model. A LightningModule is asked for its ``training_step`` where ``loss`` is not given.
        batch: What the model takes, on its device: a tensor, a tuple ``(inputs, targets)``, or a dict of keyword
            arguments (Hugging Face).
        optimizer: One optimizer, several, or several by name.
        loss: ``(model, batch) -> scalar``. By default the ``loss`` that the output carries, or else cross-entropy of
            the output with the targets.
        steps: Rehearsed steps; fewer than 13 leave the cost out.
        every_n_steps: Cadence that the cost is told for.
        show: Whether the result is printed.

    Raises:
        ValueError: For a batch, loss, model or optimizer that cannot be used, with what was expected.
        Exception: Whatever the model raises.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-3)
        >>> batch = torch.randn(16, 4), torch.randint(0, 3, (16,))
        >>> preflight(model, batch, optimizer, show=False).findings[0].text
        '2.bias, 2.weight are trainable and not in exactly one optimizer'
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = _listed(optimizer)
    _check(model, optimizers, steps)
    compute = loss or (_training_step if _is_lightning(model) else _usual_loss)
    classes = _Classes()
    settings = Settings(
        monitors=[classes, _SampledWiring()],
        default_rules=False,
        every_n_steps=_CADENCE,
        max_overhead=None,
        terminal=False,
    )
    with untouched([model], optimizers):
        notes = _make_ready(model, optimizers)
        diagnostics = Diagnostics(model, optimizer, settings=settings)
        backward = _Backward(diagnostics.watched)
        try:
            with backward:
                first = _step(diagnostics, model, batch, optimizers, compute)
            for _ in range(steps - 1):
                _step(diagnostics, model, batch, optimizers, compute)
        finally:
            diagnostics.finish()
        history, value, coverage = diagnostics.history, float(first), diagnostics.coverage
    activations, gradients = _activation_growth(history), backward.growth()
    findings = [
        *_wiring(history, diagnostics.run),
        *_first_loss(value, classes.number),
        *_steep(activations, backward.depth, "activations", "from the first block to the last"),
        *_steep(gradients, backward.depth, "gradients", "from the last block back to the first"),
        *notes,
    ]
    result = Preflight(
        loss=value,
        classes=classes.number,
        findings=tuple(sorted(findings, key=lambda f: f.severity != "warning")),
        coverage=coverage,
        activation_growth=activations,
        gradient_growth=gradients,
        history=history,
        cost=_cost(diagnostics, every_n_steps),
    )
    if show and rank() == 0:
        print_preflight(result)
    return result


# -- before --------------------------------------------------------------------------------------------


def _listed(optimizer: Optimizers) -> list[Optimizer]:
    several = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    listed = list(several) if isinstance(several, Iterable) else [several]
    for item in listed:
        if not isinstance(item, Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(item).__name__}")
        if isinstance(item, LBFGS):
            raise ValueError("LBFGS calls the model from inside its step, which preflight cannot rehearse")
    if not listed:
        raise ValueError("optimizer: expected at least one, got none")
    return listed


def _check(model: nn.Module, optimizers: Sequence[Optimizer], steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p) or p.is_meta]
    if lazy:
        raise ValueError(f"{names_of(lazy)} have no values yet: call the model once, or load its weights, before")
    mine = {id(p) for p in model.parameters()}
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not mine & owned:
        raise ValueError(
            f"the optimizer holds {len(owned)} tensors and none of the {len(mine)} of this model: build it from "
            "model.parameters(), after the model was moved, converted or wrapped"
        )


def _make_ready(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Finding]:
    """What has to be changed for the rehearsal, and is told."""
    notes = []
    if not model.training:
        model.train()
        notes.append(
            Finding("info", "the model is in evaluation mode: rehearsed in training mode, call model.train()")
        )
    starts = [
        group
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "initial_lr" in group and float(group.get("lr", 1.0)) == 0 < float(group["initial_lr"])
    ]
    for group in starts:
        group["lr"] = group["initial_lr"]
    if starts:
        notes.append(Finding("info", "the schedule starts at a learning rate of 0: rehearsed with its largest one"))
    return notes


# -- one step ------------------------------------------------------------------------------------------


def _step(
    diagnostics: Diagnostics, model: nn.Module, batch: Any, optimizers: Sequence[Optimizer], compute: Loss
) -> Tensor:
    with diagnostics.step() as step:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = compute(model, batch)
        _check_loss(value)
        step.loss(value)
        value.backward()  # type: ignore[no-untyped-call]
        step.gradients()
        for optimizer in optimizers:
            optimizer.step()
        return value.detach()


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be a tensor with one value, got {got}; {_PASS_LOSS}")
    if not value.requires_grad:
        raise ValueError("the loss does not depend on any parameter that asks for a gradient: was it detached?")
    if not math.isfinite(float(value.detach())):
        raise ValueError(f"the loss of this batch is {float(value.detach())}: look at the batch and at the weights")


_PASS_LOSS = "pass loss=, a function (model, batch) that returns it"


def _called(model: nn.Module, batch: Any) -> Any:
    """The output of the model for a batch of any of the known forms."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be called with this batch ({_shape(batch)}): "
            f"{type(error).__name__}: {error}. Expected what the model takes: a tensor, a tuple (inputs, targets) or "
            f"a dict of keyword arguments, on its device; otherwise {_PASS_LOSS}"
        ) from error


def _shape(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)} on {item.device}"
    if isinstance(item, Mapping):
        return "a dict of " + ", ".join(f"{key}: {_shape(value)}" for key, value in item.items())
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of " + ", ".join(map(_shape, item))
    return type(item).__name__


def _usual_loss(model: nn.Module, batch: Any) -> Tensor:
    output = _called(model, batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits
    if isinstance(targets, Tensor) and isinstance(logits, Tensor) and not targets.is_floating_point():
        if logits.shape[:-1] == targets.shape:
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long())
        if logits.shape[:1] + logits.shape[2:] == targets.shape:  # classes in dimension 1
            return F.cross_entropy(logits, targets.long())
    raise ValueError(
        f"no loss in what {type(model).__name__} returned ({_shape(output)}), and none can be made of it and the "
        f"batch ({_shape(batch)}): {_PASS_LOSS}. A dict needs labels; a tuple (inputs, targets) needs class indices"
    )


def _is_lightning(model: nn.Module) -> bool:
    return any(
        kind.__name__ == "LightningModule" and kind.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for kind in type(model).__mro__
    )


def _training_step(model: nn.Module, batch: Any) -> Tensor:
    if not getattr(model, "automatic_optimization", True):
        raise ValueError(f"{type(model).__name__} steps its optimizers itself: {_PASS_LOSS}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*self.log.*")  # there is no trainer to log to
            output = model.training_step(batch, 0)  # type: ignore[operator]
    except Exception as error:
        raise ValueError(
            f"the training_step of {type(model).__name__} failed without a trainer, on {_shape(batch)}: "
            f"{type(error).__name__}: {error}. If it needs the trainer, {_PASS_LOSS}"
        ) from error
    found: Tensor = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    return found


# -- what only a rehearsal looks at --------------------------------------------------------------------


class _Classes(Monitor):
    """The number of classes of the first cross-entropy that trains."""

    name = "preflight_classes"
    family = "output"
    lane = "slow"
    signals = ()

    def __init__(self) -> None:
        self.number: int | None = None

    def taps(self) -> Sequence[Tap]:
        return (LossTap(self._observe),)

    def collect(self) -> Sequence[Group]:
        return ()

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        return ()

    def _observe(self, call: LossCall) -> None:
        if self.number is None and call.logits is not None:
            self.number = call.logits.shape[-1]
        elif self.number is None and call.weight is not None:
            self.number = call.weight.shape[0]


class _Backward:
    """Size of the loss's gradient at both ends of every stack of blocks, while it is entered.

    Its hooks would make compiled blocks compile again: nothing is seen where anything is compiled.
    """

    def __init__(self, watched: Watched) -> None:
        wrappers, function = torch_private.compiled_objects()
        compiled = wrappers or function or any(torch_private.is_compiled(m) for m in watched.modules.values())
        self._watched = watched
        stacks = [s for s in block_stacks(watched) if len(s.blocks) > 1]
        self.depth = {s.name: len(s.blocks) for s in stacks}
        self._stacks = [] if compiled else stacks
        self._squares: dict[str, list[tuple[Tensor, int]]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for block in {end for stack in self._stacks for end in (stack.blocks[0], stack.blocks[-1])}:
            module = self._watched.modules[block]
            self._handles.append(module.register_forward_hook(functools.partial(self._returned, block)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _returned(self, block: str, _: nn.Module, __: object, output: object) -> None:
        found = activation_of(output)
        if found is not None and found.requires_grad:
            found.register_hook(functools.partial(self._gradient, block))  # type: ignore[no-untyped-call]

    def _gradient(self, block: str, gradient: Tensor) -> None:
        square = gradient.detach().float().square().sum()
        self._squares.setdefault(block, []).append((square, gradient.numel()))

    def growth(self) -> dict[str, float]:
        """``log(rms at the first block / rms at the last) / blocks`` by stack."""
        found = {}
        for stack in self._stacks:
            first, last = (self._mean_square(stack.blocks[at]) for at in (0, -1))
            if first > 0 and last > 0:
                found[stack.name] = math.log(first / last) / 2 / len(stack.blocks)
        return found

    def _mean_square(self, block: str) -> float:
        squares = self._squares.get(block, [])
        count = sum(n for _, n in squares)
        return sum(float(s) for s, _ in squares) / count if count else 0.0


class _SampledWiring(WiringMonitor):
    """Looks in samples alone: a fault is what all of them show, and other steps tell the time of one without."""

    early = False


# -- what it found -------------------------------------------------------------------------------------


def _wiring(history: History, run: RunInfo) -> list[Finding]:
    """Verdicts of the rules on wiring, over the samples of the rehearsal; what changes among them is no fault."""
    steps = sorted({int(s) for name in history if name.startswith("wiring/") for s in history[name].steps})
    always = max(1, len(steps))
    rules: list[Rule] = [
        Owners(persistence=1),
        Ungraded(persistence=always),
        Unchanged(persistence=always),
        FrozenChanged(),
        ReplicasDiffer(persistence=1),
        StructuralZeros(),
    ]
    found: dict[str, Finding] = {}
    for step in steps:
        frame = Frame(step, "slow", dict(_readings(history, step)), run)
        for rule in rules:
            for verdict in rule.update(frame):
                if verdict.active and rule.name not in found:
                    severity: Literal["info", "warning"] = "info" if verdict.severity == "info" else "warning"
                    found[rule.name] = Finding(severity, verdict.evidence)
    return list(found.values())


def _readings(history: History, step: int) -> Iterator[tuple[str, Reading]]:
    for name, series in history.items():
        for i in np.flatnonzero(series.steps == step):
            yield name, Reading(series.signal, series.cells, series.values[i], series.seen[i])


def _first_loss(value: float, classes: int | None) -> list[Finding]:
    if classes is None or classes < 2:
        return []
    expected = math.log(classes)
    told = f"the loss starts at {value:.2f}, log({classes:,} classes) = {expected:.2f}: "
    if value > expected + LOSS_MARGIN:
        return [Finding("warning", told + "the head starts too large, or its targets do not fit it")]
    if value < expected - LOSS_MARGIN:
        return [Finding("info", told + "trained weights, few of the classes in use, or targets among the inputs")]
    return []


def _activation_growth(history: History) -> dict[str, float]:
    series = history.get("activation/growth_exponent")
    if series is None:
        return {}
    return {str(cell): float(v) for cell, v, seen in zip(series.cells, series.values[0], series.seen[0]) if seen}


def _steep(growth: Mapping[str, float], depth: Mapping[str, int], what: str, way: str) -> list[Finding]:
    return [
        Finding(
            "info", f"{what} {'grow' if v > 0 else 'shrink'} {math.exp(abs(v)):.2f}-fold a block {way} of {stack}"
        )
        for stack, v in growth.items()
        if abs(v) > GROWTH and depth.get(stack, 0) >= DEEP
    ]


def _cost(diagnostics: Diagnostics, every_n_steps: int) -> Cost | None:
    idle, extra = diagnostics.shares(cadence=1)
    pace = diagnostics.seconds_per_step
    if pace is None or not math.isfinite(idle + extra):
        return None
    return Cost(idle=idle, sampled=idle + extra, every_n_steps=every_n_steps, seconds_per_step=pace)
