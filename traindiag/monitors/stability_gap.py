"""What training on new data does to tasks learned before: evaluation on fixed held-out samples, again and again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from traindiag.capture.held_out import HeldOut, on_device
from traindiag.capture.torch_private import is_flat_shard
from traindiag.capture.watched import Watched
from traindiag.monitors.active import ActiveMonitor
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.shift_watch import ShiftWatch
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.continual import Continual
from traindiag.record.frame import Reading
from traindiag.transfer.ranks import rank, world_size
from traindiag.transfer.states import Group, Reduced

Metric: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]

DENSE, MIDDLE = 50, 500
"""Steps after a shift with an evaluation each, and steps with one in ten: the first fall of a joint training bottomed
after one step, and of runs evaluated every 100 steps two in five missed a fall to zero (arXiv 2205.13452)."""

MIDDLE_EVERY = 10

DIAGNOSED = (0, 2, 5, 20)
"""Steps after a shift at which gradients are compared."""

_PER_TASK = ("baseline", "noise", "gap_depth", "gap_residual", "recovered")


class StabilityGap(ActiveMonitor):
    """``stability/*``: how old tasks fare while a run goes on with other data.

    Every task is evaluated on the same held-out samples for the whole run: sparsely at first, then, from a shift on,
    at every step for 50 steps and at every tenth for 500 more. A shift is marked with :meth:`mark_shift` or found: a
    training loss that jumps, a learning rate beyond twice its lowest of 50 updates, an optimizer whose state was
    reset, another data loader (Lightning). A gap is told by rules, and only after a shift.

    The model is called in evaluation mode, without gradients, in the trainer's precision; random states, buffers and
    modes are put back. Under several ranks each evaluates a share of the batches, and all call the model equally
    often, so sharded models work.

    Args:
        tasks: Loaders of held-out batches, by the name of the task. Any iterable of batches will do.
        metric: ``metric(model, batch)`` gives ``(sum, count)``: what the task is measured by, summed over the batch,
            and how much went into the sum. ``model`` is the first one that is watched, without a
            ``DistributedDataParallel`` around it; tensors of ``batch`` are on its device.
        higher_is_better: True for an accuracy, False for a loss. Values that all lie between 0 and 1 are judged in
            points, others relative to their level.
        every: Steps between evaluations while nothing happens.
        samples: Samples of each task, at most.
        gradients: Whether the gradients of old tasks are compared with those of training at steps 0, 2, 5 and 20
            after a shift (0 only where it was marked), by backward passes of our own; not seen where parameters are
            sharded. A metric that has no gradient needs a function of the same kind here that gives a loss.
        detect: Whether shifts are looked for where none is marked.
        current: The task that the run begins with, where it is one of ``tasks``. Without it all of them are old at
            the first shift.
        seed: Of the draw of the samples.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a task is empty or a number out of its range.

    Example:
        >>> from torch import nn
        >>> def loss(model, batch):
        ...     inputs, targets = batch
        ...     return nn.functional.mse_loss(model(inputs), targets, reduction="sum"), len(inputs)
        >>> old = [(torch.ones(8, 2), torch.zeros(8, 1))]
        >>> StabilityGap({"old": old}, loss, higher_is_better=False, every=10).signals[0].name
        'stability/loss'
    """

    name = "stability_gap"
    family = "stability"
    impatient: ClassVar[bool] = True

    def __init__(
        self,
        tasks: Mapping[str, Iterable[Any]],
        metric: Metric,
        *,
        higher_is_better: bool,
        every: int = 100,
        samples: int = 1000,
        gradients: bool | Metric = False,
        detect: bool = True,
        current: str | None = None,
        seed: int = 0,
    ) -> None:
        _check(tasks, metric, every, samples, gradients, current)
        if gradients is True and higher_is_better:
            raise ValueError(
                "gradients=True differentiates the metric, and one that is better when higher is none to descend; "
                "pass gradients=loss, a function of (model, batch) that gives (sum, count) of a loss"
            )
        self.tasks, self.every, self.samples, self.seed = dict(tasks), every, samples, seed
        self._metric = metric
        self._loss: Metric | None = metric if gradients is True else gradients or None
        self._value = BY_NAME["stability/value" if higher_is_better else "stability/loss"]
        names = ["start", *_PER_TASK, "min_acc", "wc_acc", "wf_10", "wf_100", "wp_10", "wp_100", "forgetting"]
        names += ["backward_transfer", *(["gradient_ratio", "gradient_cosine"] if gradients else [])]
        self.signals = (self._value, *(BY_NAME[f"stability/{n}"] for n in names))
        self.continual = Continual(tuple(tasks), higher_is_better, current)
        """What is known so far, such as ``continual.gaps["old"].verdict``."""
        self._current = current
        self._shift: int | None = None
        self._pending: list[tuple[int, str | None]] = []
        self._watch = ShiftWatch(self._turn, lambda: self._asked + 1, detect)
        self._cells = Cells.along("task", tasks)
        self._held_out: dict[str, HeldOut] = {}
        self._models: tuple[nn.Module, ...] = ()
        self._watched: Watched | None = None
        self._asked = -1
        self._start: Tensor | None = None
        self._found: tuple[int, Tensor] | None = None
        self._digests: dict[str, str] = {}
        self._trained: dict[str, list[Tensor | None]] = {}
        self._pulls: dict[str, Tensor] = {}

    def mark_shift(self, reason: str = "marked", task: str | None = None) -> None:
        """Training is another one from the step under way on, or from the next one if called between steps.

        Call it on every rank.

        Args:
            reason: What has changed, in a few words; alerts repeat it.
            task: The task that training turns to, where that is one of :attr:`tasks`: it is left out of what may be
                forgotten, and worst-case accuracy needs to know it.

        Raises:
            TypeError: If the reason is no text.
            ValueError: If there is no such task, or the reason is empty.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a text, got {reason!r}")
        if not reason.strip():
            raise ValueError("reason must say what has changed in a few words, got an empty text")
        if task is not None and task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(map(repr, self.tasks))} or None, got {task!r}")
        self._watch.mark(reason.strip(), task)

    def companions(self) -> Sequence[Monitor]:
        return (self._watch,)

    def prepare(self, watched: Watched) -> None:
        self._watched = watched
        self._models = watched.roots
        if self._held_out:
            return
        self._held_out = {n: HeldOut(n, loader, self.samples, self.seed) for n, loader in self.tasks.items()}
        for name, held_out in self._held_out.items():
            self._compare(name, held_out.digest)

    # -- evaluation ----------------------------------------------------------------------------

    def due(self, step: int, updates: Mapping[str, int]) -> bool:
        self._asked = step
        if self._watch.marked and world_size() == 1:  # other ranks would learn of it one step later
            return True
        age = None if self._shift is None else step - self._shift
        if age is not None and age < DENSE:
            return True
        if age is not None and age <= DENSE + MIDDLE and age % MIDDLE_EVERY == 0:
            return True
        return step % self.every == 0

    def start(self) -> None:
        if self._asked >= 0:  # another run with the same monitor, such as a second fit: only its marks go on
            self._asked, self._shift = -1, None
            self._pending.clear()
            self._watch.forget()
            self.continual = Continual(tuple(self.tasks), self.continual.higher_is_better, self._current)
        self._start = self._evaluate()

    def probe(self, step: int) -> None:
        self._found = step, self._evaluate()
        if self._trained:
            trained, self._trained = self._trained, {}
            with torch.enable_grad():
                self._pulls = {name: self._pull(name, trained) for name in self.tasks}

    def _evaluate(self) -> Tensor:
        """Sums and counts of this rank's share, float64 ``[2, tasks]`` on the host."""
        model = self._model()
        model.eval()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        totals = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        ranks, own = world_size(), rank()
        for column, (name, held_out) in enumerate(self._held_out.items()):
            total, count = torch.zeros((), dtype=torch.float64, device=device), 0.0
            rounds = -(-len(held_out.batches) // ranks)
            for i in range(own, rounds * ranks, ranks):
                spare = i >= len(held_out.batches)  # a sharded model is called by all ranks or by none
                batch = held_out.batches[0 if spare else i]
                found, size = _pair(name, self._metric(model, on_device(batch, device)))
                if not spare:
                    total, count = total + found.detach().to(device, torch.float64), count + size
            totals[0, column], totals[1, column] = total.cpu(), count
        return totals

    def _model(self) -> nn.Module:
        model = self._models[0]
        return model.module if isinstance(model, DistributedDataParallel) else model

    # -- gradients, only if asked for ------------------------------------------------------------

    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        if self._loss is None or not self._compares() or self._watched is None:
            return
        owned = [p for _, p in self._watched.parameters[optimizer]]
        if any(isinstance(p, DTensor) or is_flat_shard(p) for p in owned):
            return
        found = [None if p.grad is None or p.grad.is_sparse else p.grad.detach().clone() for p in owned]
        self._trained[optimizer] = [g if g is None or scale is None else g / scale for g in found]

    def _compares(self) -> bool:
        if self._watch.marks:
            return True
        return self._shift is not None and self._asked + 1 - self._shift in DIAGNOSED

    def _pull(self, task: str, trained: Mapping[str, Sequence[Tensor | None]]) -> Tensor:
        """``|g_new|^2``, ``|g_old|^2`` and their product, float64 ``[3]``; the whole task, alike on all ranks."""
        assert self._watched is not None and self._loss is not None
        model = self._model()
        pairs = [
            (p, new)
            for name, gradients in trained.items()
            for (_, p), new in zip(self._watched.parameters[name], gradients)
            if new is not None and p.requires_grad
        ]
        parameters = [p for p, _ in pairs]
        device = parameters[0].device
        old = [torch.zeros_like(p) for p in parameters]
        count = 0.0
        for batch in self._held_out[task].batches:
            total, size = _pair(task, self._loss(model, on_device(batch, device)))
            if not total.requires_grad:
                raise ValueError(
                    "gradients need a metric whose sum can be differentiated; pass gradients=loss, a function of "
                    "(model, batch) that gives (sum, count) of a loss"
                )
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            old = [o if g is None else o + g.detach() for o, g in zip(old, found)]
            count += size
        state = torch.zeros(3, dtype=torch.float64)
        for o, (_, new) in zip(old, pairs):
            a, b = new.double(), o.double() / count
            state += torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()]).cpu()
        return state

    # -- what comes of it ------------------------------------------------------------------------

    def collect(self) -> Sequence[Group]:
        found, self._found = self._found, None
        start, self._start = self._start, None
        pulls, self._pulls = self._pulls, {}
        if found is None:
            return ()
        step, totals = found
        clock = torch.tensor([float(step)], dtype=torch.float64)
        groups = [
            Group("step", Cells.single(), {"sum": clock, "ranks": torch.ones(1)}),
            Group("value", self._cells, {"total": totals[0], "count": totals[1]}),
        ]
        if start is not None:
            groups.append(Group("start", self._cells, {"total": start[0], "count": start[1]}))
        if pulls:
            names = ("new", "old", "dot")
            states = torch.stack(list(pulls.values()), dim=1)
            groups.append(Group("pulls", Cells.along("task", pulls), dict(zip(names, states))))
        return groups

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (value := states.get("value")) is None:
            return []
        clock = states["step"]
        step = round(float(clock.sums["sum"][0] / clock.sums["ranks"][0]))
        readings = []
        if (start := states.get("start")) is not None:
            before = _means(start)
            readings.append(Reading.masked(BY_NAME["stability/start"], self._cells, before, np.isfinite(before)))
            self._take(-1, before, start.sums["count"])
        pending, self._pending = self._pending, []
        for shift, task in pending:  # not when they were heard: a run may begin with one, before its start is known
            self.continual.turn(shift, task)
        means = _means(value)
        readings.append(Reading(self._value, self._cells, means, value.seen & (value.sums["count"] > 0)))
        self._take(step, means, value.sums["count"])
        readings += self._gaps()
        readings += [
            Reading.scalar(BY_NAME[f"stability/{name}"], number) for name, number in self.continual.summary().items()
        ]
        if (pulls := states.get("pulls")) is not None:
            readings += _pulled(pulls)
        return readings

    def _take(self, step: int, means: NDArray[np.float32], counts: NDArray[np.float64]) -> None:
        values = {n: float(v) for n, v in zip(self.tasks, means)}  # as they are recorded, so that rules find the same
        self.continual.evaluate(step, values, {n: float(c) for n, c in zip(self.tasks, counts)})

    def _gaps(self) -> list[Reading]:
        gaps = [self.continual.gaps.get(name) for name in self.tasks]
        seen = np.array([gap is not None and gap.evaluations > 0 for gap in gaps], np.bool_)
        if not seen.any():
            return []
        columns = {
            "baseline": [math.nan if g is None else g.baseline for g in gaps],
            "noise": [math.nan if g is None else g.noise for g in gaps],
            "gap_depth": [math.nan if g is None else g.depth for g in gaps],
            "gap_residual": [math.nan if g is None else g.residual for g in gaps],
            "recovered": [math.nan if g is None or g.recovered is None else g.recovered for g in gaps],
        }
        found = []
        for name, column in columns.items():
            values = np.array(column)
            there = seen & np.isfinite(values)
            if there.any():
                found.append(Reading.masked(BY_NAME[f"stability/{name}"], self._cells, values, there))
        return found

    def _turn(self, step: int, reasons: tuple[str, ...], task: str | None) -> None:
        self._shift = step
        self._pending.append((step, task))

    # -- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "asked": self._asked,
            "shift": self._shift,
            "pending": [list(turn) for turn in self._pending],
            "continual": self.continual.state_dict(),
            "digests": {name: held_out.digest for name, held_out in self._held_out.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked, self._shift = int(state["asked"]), state["shift"]
        self._pending = [(int(step), task) for step, task in state["pending"]]
        self.continual.load_state_dict(state["continual"])
        self._digests = dict(state["digests"])
        for name, held_out in self._held_out.items():
            self._compare(name, held_out.digest)

    def _compare(self, name: str, digest: str) -> None:
        """Values on other samples are no measure for what was seen before."""
        if self._digests.get(name, digest) != digest:
            warnings.warn(
                f"StabilityGap: the held-out samples of task {name!r} are others than in the checkpoint, so its "
                "baseline and its gaps begin anew; give it the same data to go on with them",
                RuntimeWarning,
                stacklevel=2,
            )
            self.continual.forget(name)
        self._digests.pop(name, None)


def _check(
    tasks: Mapping[str, Iterable[Any]],
    metric: Metric,
    every: int,
    samples: int,
    gradients: bool | Metric,
    current: str | None,
) -> None:
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must map the name of a task to its held-out loader, got {tasks!r}")
    if not tasks:
        raise ValueError("tasks must name at least one held-out loader, got none")
    for name, loader in tasks.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a task must be a text, got {name!r}")
        if isinstance(loader, (str, bytes)) or not isinstance(loader, Iterable):
            raise TypeError(f"tasks[{name!r}] must be a loader or another iterable of batches, got {loader!r}")
        with suppress(TypeError):  # a loader over a stream has a length and cannot tell it
            if isinstance(loader, Sized) and len(loader) == 0:
                raise ValueError(f"the loader of task {name!r} holds no batch; expected held-out samples of the task")
    if not callable(metric):
        raise TypeError(f"metric must be a function of (model, batch) that gives (sum, count), got {metric!r}")
    for what, number in (("every", every), ("samples", samples)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{what} must be an integer of at least 1, got {number!r}")
    if not (isinstance(gradients, bool) or callable(gradients)):
        raise TypeError(f"gradients must be a bool, or a function as metric is, got {gradients!r}")
    if current is not None and current not in tasks:
        raise ValueError(f"current must be one of {', '.join(map(repr, tasks))} or None, got {current!r}")


def _pair(task: str, found: Any) -> tuple[Tensor, float]:
    """What a metric gave, checked.

    Raises:
        TypeError: If it is no pair of numbers.
        ValueError: If the count is no positive number.
    """
    expected = f"metric must give (sum, count) of a batch of task {task!r}"
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"{expected}, got {_shown(found)}")
    total, count = found
    for what, number in (("sum", total), ("count", count)):
        scalar = isinstance(number, Tensor) and number.numel() == 1
        if not scalar and (isinstance(number, bool) or not isinstance(number, (int, float, np.number))):
            raise TypeError(f"{expected}, two numbers; got {_shown(number)} for the {what}")
    size = float(count)
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"{expected} with a positive count, got {size}")
    return total.reshape(()) if isinstance(total, Tensor) else torch.tensor(float(total)), size


def _shown(found: Any) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)


def _means(group: Reduced) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore", divide="ignore"):
        means: NDArray[np.float32] = (group.sums["total"] / group.sums["count"]).astype(np.float32)
    return means


def _pulled(group: Reduced) -> list[Reading]:
    new, old, dot = (group.sums[n] for n in ("new", "old", "dot"))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, cosine = np.sqrt(new / old), dot / np.sqrt(new * old)
    seen = group.seen & (old > 0) & (new > 0)
    return [
        Reading.masked(BY_NAME["stability/gradient_ratio"], group.cells, ratio, seen),
        Reading.masked(BY_NAME["stability/gradient_cosine"], group.cells, cosine, seen),
    ]
