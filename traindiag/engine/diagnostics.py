"""The engine: what happens in one step, in which order, for any training loop."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from traindiag.alerts.actions import TrainingAlert
from traindiag.alerts.alert import Alert
from traindiag.capture.names import watch
from traindiag.capture.parameter_sample import ParameterSample, Update
from traindiag.capture.taps import LossCall, ModuleTap, Tap
from traindiag.capture.window import Capture
from traindiag.engine.active import ActiveLane, Precision
from traindiag.engine.aside import Aside
from traindiag.engine.batches import name_batch
from traindiag.engine.closures import closure_of, with_closure
from traindiag.engine.containment import Border, LeavingLane, describe
from traindiag.engine.decisions import Decisions, Save
from traindiag.engine.entrances import at_entrances
from traindiag.engine.judge import BATCH, Judge
from traindiag.engine.lanes import MonitorLane, Received, StepFacts
from traindiag.engine.meter import Meter
from traindiag.engine.outlet import Outlet
from traindiag.engine.run_facts import run_facts, shared_run_id, with_attention
from traindiag.engine.schedule import Schedule
from traindiag.engine.settings import Settings
from traindiag.engine.sight import coverage_of
from traindiag.engine.step import Step
from traindiag.monitors.logged import LoggedMonitor
from traindiag.monitors.monitor import Monitor
from traindiag.record.coverage import Coverage
from traindiag.record.log import LogData
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History
from traindiag.transfer.ranks import world_size

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STATE_VERSION = 1
_PATIENCE = 2.0  # seconds for other ranks' last message after an exception

Models = nn.Module | Mapping[str, nn.Module]
Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


class Diagnostics:
    """Watches the training of a model in any loop.

    Args:
        model: The model, or several by name.
        optimizers: One optimizer, several, or several by name; cells carry the names.
        log_dir: Where panels and alerts are written; None keeps everything in memory.
        outlet: Takes the place of ``log_dir`` where a framework brings loggers of its own.
        facts: What is known of the run, by field of :class:`RunInfo` (``length``, ``precision``, ``clip``, ...).
        schedulers: Learning-rate schedulers, for peak and warm-up.
        save: Saves a checkpoint, given a name for it, where a framework knows how to.
        settings: Ready settings, in place of keywords.
        keywords: Fields of :class:`~traindiag.engine.settings.Settings`.

    Attributes:
        border: For adapters: an error inside ``with diagnostics.border:`` is told once and switches diagnostics off,
            as one of the engine's own does.

    Raises:
        ValueError: For a wrong setting, a module that is not there included, with its value and what was expected.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> diagnostics = Diagnostics(model, optimizer, terminal=False)
        >>> for _ in range(3):
        ...     with diagnostics.step() as step:
        ...         loss = step.loss(model(torch.ones(2, 4)).square().mean())
        ...         loss.backward()
        ...         step.gradients()
        ...         _ = optimizer.step()
        ...         optimizer.zero_grad()
        >>> diagnostics.finish()
        >>> diagnostics.history["loss/value"].steps.tolist()
        [0, 1, 2]
    """

    def __init__(
        self,
        model: Models,
        optimizers: Optimizers,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        outlet: Outlet | None = None,
        facts: Mapping[str, Any] | None = None,
        schedulers: Iterable[object] = (),
        save: Save | None = None,
        settings: Settings | None = None,
        **keywords: Any,
    ) -> None:
        if settings is not None and keywords:
            raise ValueError(f"pass either settings or keywords, got both: {sorted(keywords)}")
        self.settings = settings or Settings(**keywords)
        self.models = list(model.values()) if isinstance(model, Mapping) else [model]
        self.watched = watch(model, optimizers, self.settings.watch)
        known = {"run_id": shared_run_id(), "silenced": dict(self.settings.silence), **(facts or {})}
        self.run = run_facts(self.watched, self.models, schedulers, **known)
        self.step_count = 0
        self.segment = 0
        self.updates = dict.fromkeys(self.watched.optimizers, 0)

        self._logged = LoggedMonitor()
        monitors: list[Monitor] = [*self.settings.build_monitors(), self._logged]
        device = next((p.device for ps in self.watched.parameters.values() for _, p in ps), torch.device("cpu"))
        self._outlet = outlet or Outlet.to_directory(log_dir, self.settings)
        report, strict = self._tell, self.settings.strict
        self._fast, self._slow = (
            LeavingLane(name, [m for m in monitors if m.lane == name], device, strict=strict, report=report)
            for name in ("fast", "slow")
        )
        active = [m for m in monitors if m.lane == "active"]
        self._active = ActiveLane(active, self.models, device, strict=strict, report=report) if active else None
        self._judge = Judge(
            self.settings.build_rules(),
            self.run.run_id,
            strict=strict,
            report=report,
            impatient=any(m.impatient for m in monitors),
        )
        self._decisions = Decisions(self.settings.actions, save, self._tell)
        self._has_early = any(m.early for m in self._slow.monitors.values())
        self._schedule = Schedule(self.settings.every_n_steps, self.settings.max_overhead)
        self._meter = Meter()
        self.border = Border(self._fail, strict=strict)
        self._capture = Capture(self.border, self._meter)
        self._failed: str | None = None
        self._off = False
        self._aside = Aside[None]()
        self._heard: list[_Heard] = []
        self._hearing = False

        self._data: list[object] | None = None
        self._armed = False
        self._in_step = False
        self._sampling = False
        self._early = False
        self._told_coverage = False
        self._told_backoff = False
        self._ordered = False
        self._refused_loss = False
        self._steps_end_with_updates = False
        self.measures_applied_gradients = True
        self._seen_gradients: set[str] = set()
        self._updated: set[str] = set()
        self._learning_rates: dict[str, float] = {}
        self._batches: list[str] = []
        self._batch_id = self.settings.batch_id
        self._handles: list[RemovableHandle] = []
        self._samples: dict[str, ParameterSample] = {}
        self._stepping: dict[str, int] = {}
        for monitor in self.settings.monitors:
            try:
                monitor.prepare(self.watched)
            except (ValueError, TypeError):  # a wrong argument, such as a module that is not there: told here and now
                raise
            except Exception:  # a fault of the monitor: contained when it is armed, like all others
                continue
        self._arm()

    # -- what there is to see ------------------------------------------------------------------

    @property
    def alerts(self) -> list[Alert]:
        """Everything told so far, oldest first."""
        self._catch_up()
        return self._judge.alerts

    @property
    def history(self) -> History:
        """Every number measured so far, by signal."""
        self._catch_up()
        with self.border:
            self._judge.record()
        return self._judge.history

    @property
    def should_stop(self) -> bool:
        """Whether an action asks for the end of training; it begins to at the same step on all ranks."""
        return self._decisions.should_stop

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What is seen and what is not, family by family, with reasons."""
        monitors = [m for lane in self._lanes() for m in lane.monitors.values()]
        families = {m.family for m in monitors}
        outputs = [
            row
            for m in monitors
            for tap in m.taps()
            if isinstance(tap, ModuleTap)
            for row in self._capture.module_coverage(m.family, tap.modules)
        ]
        if "output" in families:
            outputs += self._capture.output_coverage()
        attention = self._capture.coverage() if "attention" in families else None
        rows = coverage_of(attention, outputs, self.watched, self.history, families)
        off = self._off_by_family()
        return tuple(replace(r, sight="unseen", reason=off[r.family]) if r.family in off else r for r in rows)

    def plot(self, what: str = "timeline", *, theme: str = "light", **options: str) -> Figure:
        """A figure of what was measured so far, for a notebook.

        Args:
            what: A figure of the report by its id, such as ``timeline`` or ``heads-over-time``, or a signal by name.
            theme: ``light`` or ``dark``.
            **options: Such as ``step="100"``.

        Raises:
            ModuleNotFoundError: With what to install, if plotly is missing.
            ValueError: If there is neither such a figure nor such a signal.
        """
        from traindiag.panels.notebook import plot

        alerts = tuple(alert.to_dict() for alert in self.alerts)
        log = LogData(self.run, self.history, alerts, self.coverage, (), (), ())
        return plot(log, what, theme=theme, **options)

    @property
    def overhead(self) -> float:
        """Time spent in diagnostics as a share of the time of all steps; NaN before the second step."""
        return self._meter.total_share

    def shares(self, cadence: int) -> tuple[float, float]:
        """Recent cost of what is done every step and of what a sample adds, spread over ``cadence`` steps, as shares
        of the time of a step without diagnostics; NaN before three steps of either kind.
        """
        return self._meter.recent_shares(cadence)

    @property
    def seconds_per_step(self) -> float | None:
        """Median of recent steps; None before the second one."""
        return self._meter.seconds_per_step

    # -- a loop that is yours ------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Marks one optimizer step, all its micro-batches included."""
        self.begin()
        try:
            yield Step(self)
        except BaseException:
            self.finish(failed=True)
            raise
        self.end()

    def log(self, name: str, value: Tensor | float) -> None:
        """Takes a number of your own for this step; every rule can judge it.

        Args:
            name: ``family/metric``, none of the built-in names.
            value: A number or a tensor that holds one; a tensor stays on its device.
        """
        if not self._failed:
            self._logged.log(name, value)

    # -- a loop that is not yours --------------------------------------------------------------

    @classmethod
    def attach(
        cls,
        model: Models,
        optimizers: Optimizers,
        log_dir: str | os.PathLike[str] | None = None,
        **keywords: Any,
    ) -> Diagnostics:
        """Watches a loop without a line inside it; ends with :meth:`detach`.

        It lives on hooks of the optimizers and of the model's forward pass. A step ends when its optimizer has
        stepped; with several, when one that has already stepped is about to step again. Loops clip before they call
        the optimizer, so the gradient norm is ``gradient/norm_applied``; with a closure it is that of the gradients
        which its last call left. A loss is not seen.

        Where optimizers take turns (an actor every second update), a cadence that shares a factor with theirs may
        never meet one of them: 7 is safer than 10. ``coverage`` tells of an optimizer that no sample has met.

        Example:
            >>> model = nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            >>> diagnostics = Diagnostics.attach(model, optimizer, terminal=False)
            >>> for _ in range(3):
            ...     optimizer.zero_grad()
            ...     model(torch.ones(2, 4)).square().mean().backward()
            ...     _ = optimizer.step()
            >>> diagnostics.detach()
            >>> diagnostics.history["gradient/norm_applied"].steps.tolist()
            [0, 1, 2]
        """
        diagnostics = cls(model, optimizers, log_dir, **keywords)
        diagnostics._live_on_hooks()
        return diagnostics

    def detach(self) -> None:
        """Ends :meth:`attach`: judges what is under way and removes every hook."""
        self.finish()

    # -- the life of a step, for adapters ------------------------------------------------------

    @property
    def sampling(self) -> bool:
        """Whether the slow lane measures the step that is under way."""
        return self._in_step and self._sampling

    def learn(self, **facts: Any) -> None:
        """Adds facts about the run that became known after it began."""
        self.run = replace(self.run, **facts)

    def computes_in(self, precision: Precision) -> None:
        """Tells in which context the trainer runs its forward passes, for those of active monitors."""
        if self._active is not None:
            self._active.precision = precision

    def data(self, source: object) -> None:
        """Tells where batches come from; monitors are told where that is another data set than it was.

        Args:
            source: A loader, or loaders in a list or mapping. A loader that was made anew over the same data set is
                no change.
        """
        if self._failed:
            return
        with self.border:
            before, self._data = self._data, _data_sets(source)
            if before is not None and [id(d) for d in before] != [id(d) for d in self._data]:
                for lane in self._lanes():
                    lane.each("data_changed")

    def begin(self, inside: nn.Module | None = None) -> None:
        """A micro-batch begins; the first one of a step begins the step.

        Args:
            inside: The module whose call is what begins it.
        """
        with self.border, self._meter:
            self._stepping.clear()  # a step that raised never came to its end
            self._begin_step()
            if self._sampling and not self._failed:
                self._capture.open(inside)
            else:
                self._capture.close()  # what a step that ended inside of its backward pass could not

    def batch(self, batch: object, place: str = "") -> None:
        """Tells which batch the micro-batch under way is made of, so that an alert can name it.

        Args:
            batch: Given to ``batch_id`` of the settings, if there is one.
            place: Where it stands in the data, such as ``epoch 0, batch 12``.
        """
        if self._failed:
            return
        with self.border, self._meter:
            label = name_batch(batch, place, self._batch_id, self._no_batch_ids)
            if label:
                self._batches.append(label)

    def _no_batch_ids(self, error: Exception) -> None:
        self._batch_id = None
        self._tell(f"batch_id failed and is not asked again: {describe(error)}; training goes on")

    def before_backward(self) -> None:
        """The forward pass is over for now."""
        with self.border:
            self._capture.pause()
        self.judge_aside()

    def judge_aside(self) -> None:
        """Judges a sample, or steps enough to be worth it, beside the backward pass, which leaves the interpreter
        free.
        """
        with self.border:
            if not self._failed and not self._aside.busy and self._has_work():
                run, told = self.run, self._told_coverage
                self._aside.start(lambda: self._hear_aside(run, told))

    def after_backward(self) -> None:
        """More forward passes may come."""
        with self.border:
            self._capture.resume()

    def loss(self, value: Tensor, optimizer: str | None = None) -> None:
        """Takes the loss of a micro-batch, not divided by the accumulation.

        Args:
            value: A scalar tensor; anything else is refused once with a warning, and training goes on.
            optimizer: Name of the optimizer that it is for; the first one if not given.
        """
        if self._failed or not self._measures_fast():
            return
        with self.border, self._meter:
            if not isinstance(value, Tensor) or value.numel() != 1:
                self._refuse_loss(value)
                return
            name = optimizer or next(iter(self.watched.optimizers))
            scalar = value.detach()
            self._fast.each("loss", name, scalar)

    def gradients(
        self, optimizer: str | None = None, *, applied: bool = False, scale: Tensor | float | None = None
    ) -> None:
        """Gradients are complete and true: unscaled, and not clipped unless ``applied``.

        Args:
            optimizer: Name of the optimizer that is about to step; all of them if not given.
            applied: Whether they may have been clipped already.
            scale: What they are still multiplied by.
        """
        if self._failed:
            return
        with self.border, self._meter:
            self._follow_forward_order()
            for name in self.watched.optimizers if optimizer is None else [optimizer]:
                self._seen_gradients.add(name)
                for lane in self._measuring():
                    lane.each("gradients", name, applied=applied, scale=scale)

    def end(self, *, step_done: bool = True) -> None:
        """A micro-batch ends; ``step_done`` where it ended an accumulation.

        Raises:
            TrainingAlert: If an alert is to be raised. Everything is written then, and nothing is left behind.
        """
        with self._meter:
            with self.border:
                self._capture.close()
            if not (step_done and self._in_step):
                return
            if not self._off:
                self._receive()
            if not self._off:
                self._send()
        self.step_count += 1
        self._in_step = False
        self._meter.step_done(sampled=self._sampling)
        self._act()

    def idle(self) -> None:
        """Something other than training goes on, such as validation; its time is not a step's."""
        self._meter.pause()

    def finish(self, *, failed: bool = False) -> None:
        """Judges what is under way, tells the summary and removes every hook; safe to call again.

        Args:
            failed: The run ends by an exception. Other ranks may never answer then, so they get little time.

        Raises:
            TrainingAlert: If what was under way is to be raised, unless ``failed``.
        """
        if not self._armed:
            return
        self._armed = False
        patience = _PATIENCE if failed else None
        try:
            with self.border:
                self._capture.close()
            self._receive(patience, everything=True)
            if self._in_step and world_size() == 1 and not self._off:  # what the broken step had shown so far
                self._send(broken=True)
                self.step_count += 1
                self._receive(patience, everything=True)
        finally:
            self._in_step = False
            self._remove_hooks()
            self._aside.close()
            with self.border:
                self._outlet.finish(self.history, self.alerts, self.step_count, self.overhead)
        if not failed and (alert := self._decisions.act(self.step_count, last=True)) is not None:
            raise TrainingAlert(alert)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed job needs: plain data, values that all ranks share, any number of ranks.

        Empty where it could not be put together; a resumed job then begins to diagnose anew.
        """
        with self.border, self._meter:
            self._receive(everything=True)
            return {
                "version": STATE_VERSION,
                "segment": self.segment,
                "step": self.step_count,
                "updates": dict(self.updates),
                "schedule": self._schedule.state_dict(),
                "judge": self._judge.state_dict(),
                "lane": self._fast.state_dict(),
                "decisions": self._decisions.state_dict(),
                "monitors": {m.name: m.state_dict() for lane in self._lanes() for m in lane.monitors.values()},
            }
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run as its next segment; an empty state changes nothing.

        Raises:
            ValueError: If the state is of a newer version.
        """
        if not state:
            return
        if state["version"] > STATE_VERSION:
            raise ValueError(
                f"the checkpoint holds traindiag state of version {state['version']}; this package knows "
                f"{STATE_VERSION}. Update traindiag to resume with it."
            )
        self.run = replace(self.run, run_id=str(state["judge"]["run_id"]))
        self.segment = int(state["segment"]) + 1
        self.step_count = int(state["step"])
        self.updates.update({n: int(c) for n, c in state["updates"].items() if n in self.updates})
        self._schedule.load_state_dict(state["schedule"])
        self._judge.load_state_dict(state["judge"])
        if "lane" in state:  # checkpoints of version 1 may be older than it
            self._fast.load_state_dict(state["lane"])
        if "decisions" in state:
            self._decisions.load_state_dict(state["decisions"])
        for lane in self._lanes():
            for name, monitor in lane.monitors.items():
                if name in state["monitors"]:
                    monitor.load_state_dict(state["monitors"][name])

    # -- inside --------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """An error of ours reached the border: from here on nothing is measured and the run goes on as if alone.

        Other ranks count on our messages. Until they have read that we failed, steps are counted and empty
        messages sent; then all ranks are off.
        """
        if self._failed:
            return
        cause = self._failed = describe(error)
        with suppress(Exception):
            self._capture.close()
        for lane in self._lanes():
            lane.leave(cause)
        if world_size() == 1:
            self._switch_off()
        self._tell_off(cause)

    def _switch_off(self) -> None:
        self._off = True
        with suppress(Exception):
            self._capture.close()
        self._remove_hooks()

    def _tell_off(self, cause: str) -> None:
        self._tell(f"diagnostics are off from step {self.step_count} on: {cause}; training goes on without them")

    def _tell(self, text: str) -> None:
        try:
            self._outlet.say(text)
        except Exception:  # what we speak through may be what is broken
            with suppress(Exception):
                print(f"traindiag: {text}", file=sys.stderr)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for lane in self._lanes():
            lane.close()

    def _off_by_family(self) -> dict[str, str]:
        """Families in which nothing works any more, with the cause: what was seen of them is no health."""
        every = [(m, lane) for lane in self._lanes() for m in lane.monitors.values()]
        if self._failed:
            return dict.fromkeys((m.family for m, _ in every), f"diagnostics are off: {self._failed}")
        work = {m.family for m, lane in every if m.name not in lane.off}
        return {m.family: lane.off[m.name] for m, lane in every if m.family not in work}

    def _lanes(self) -> tuple[LeavingLane, ...]:
        # in this order: a non-finite gradient is told before what follows from it
        return (self._fast, self._slow) if self._active is None else (self._fast, self._slow, self._active)

    def _arm(self) -> None:
        """Installs what a run needs, before its first step or when a loop goes on after an exception."""
        taps: list[Tap] = []
        for lane in self._lanes():
            lane.each("prepare", self.watched)
            for monitor in lane.working():
                with lane.contained(monitor, "taps"):
                    taps += [self._contained_tap(lane, monitor, tap) for tap in monitor.taps()]
        self._capture.prepare(self.watched, taps)
        if not self._samples:  # in the order of the model, for good: what is compared must keep its place
            ranks = world_size()
            self._samples = {
                name: ParameterSample(name, owned, ranks=ranks) for name, owned in self.watched.parameters.items()
            }
        for name, optimizer in self.watched.optimizers.items():
            self._handles.append(optimizer.register_step_pre_hook(functools.partial(self._before_update, name)))
            self._handles.append(optimizer.register_step_post_hook(functools.partial(self._after_update, name)))
        self._armed = True

    def _follow_forward_order(self) -> None:
        """Once the first sample has shown it, parameters stand in the order in which the forward pass meets them.

        The first non-finite gradient in that order is then the one to look at.
        """
        if self._ordered or self._early or not self._capture.forward_order:
            return
        self._ordered = True
        self.watched = self.watched.in_order(self._capture.forward_order)
        for lane in self._lanes():
            lane.each("prepare", self.watched)

    def _live_on_hooks(self) -> None:
        self._steps_end_with_updates = True
        trained = {id(p) for ps in self.watched.parameters.values() for _, p in ps}

        def close() -> None:
            with self.border:
                self._capture.close()

        def probing() -> bool:
            return self._active is not None and self._active.probing

        self._handles += at_entrances(
            self.models, trained, begin=lambda module: self.begin(inside=module), close=close, ignore=probing
        )

    def _contained_tap(self, lane: MonitorLane, monitor: Monitor, tap: Tap) -> Tap:
        def observe(call: Any) -> None:
            if lane.works(monitor):
                place = call.site if isinstance(call, LossCall) else call.layer
                with self._meter, lane.contained(monitor, f"observe at {place}"):
                    tap.observe(call)

        return replace(tap, observe=observe)

    def _begin_step(self) -> None:
        if self._in_step:
            return
        self._in_step = True  # this and the next lines first: whatever fails, ranks must send the same messages
        self._sampling = self._schedule.due(self.step_count)
        self._early = not self._sampling and self._has_early and self._schedule.early(self.step_count)
        self._fast.lean, self._slow.early = self._schedule.lean and not self._sampling, False
        self._seen_gradients.clear()
        self._updated.clear()
        self._batches.clear()
        if self._failed:
            return
        if not self._armed:
            self._arm()
        self._slow.early = self._early  # not before: all monitors are armed in such a step too
        if self.step_count == 0 and self._active is not None:
            self._active.start()
        self._outlet.start(self.run, self.segment, self.step_count)

    def _before_update(
        self, name: str, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        depth = self._stepping[name] = self._stepping.get(name, 0) + 1
        if depth > 1:  # a subclass whose step calls the step of its base runs every hook twice
            return None
        if self._steps_end_with_updates:
            with self.border:
                self._capture.close()
            if name in self._updated:
                self.end()
            with self.border:
                self._begin_step()
        if self._failed or not self._in_step:
            return None
        with self.border:
            rate = optimizer.param_groups[0].get("lr")
            if isinstance(rate, (int, float)):  # a tensor would need a wait for the device
                self._learning_rates[name] = float(rate)
            closure = closure_of(args, kwargs)
            if closure is None:  # a closure makes the gradients, when this hook is over
                # a fused optimizer divides by the loss scale itself, inside of its step
                scale = getattr(optimizer, "grad_scale", None)
                self._measure_applied(name, scale)
                self._show_applied(name, scale)
            if self._sampling or self._early:
                with self._meter:
                    update = Update(self._samples[name], optimizer)
                    for lane in self._measuring():
                        lane.each("before_update", name, update)
            if closure is not None and self._sampling:
                return with_closure(args, kwargs, self._shown_after(closure, name))
        return None

    def _after_update(self, name: str, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depth = self._stepping[name] = self._stepping.get(name, 0) - 1
        if depth > 0:
            return
        with self.border, self._meter:
            if closure_of(args, kwargs) is not None:
                self._measure_applied(name)
            self.updates[name] += 1
            self._updated.add(name)
            self._seen_gradients.discard(name)
            for lane in self._measuring():
                lane.each("updated", name)
        if self._steps_end_with_updates and len(self.watched.optimizers) == 1:
            self.end()

    def _measure_applied(self, name: str, scale: Tensor | float | None = None) -> None:
        """Gradients as the optimizer uses them, where nobody has shown them before."""
        if self._in_step and self.measures_applied_gradients and name not in self._seen_gradients:
            self.gradients(name, applied=True, scale=scale)

    def _show_applied(self, name: str, scale: Tensor | float | None = None) -> None:
        """The same in samples, where they have been shown before any clipping too."""
        with self.border, self._meter:
            if self._in_step and self._sampling and not self._failed and name in self._seen_gradients:
                for lane in self._measuring():
                    lane.each("applied", name, scale=scale)

    def _shown_after(self, closure: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A closure that clips leaves no other moment: an optimizer may write over its gradients as it steps."""

        @functools.wraps(closure)
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._show_applied(name)
            return loss

        return evaluated

    def _measures_fast(self) -> bool:
        return self._in_step and (self.settings.fast or self._sampling)

    def _measuring(self) -> list[LeavingLane]:
        fast = [self._fast] if self._measures_fast() else []
        slow = [self._slow] if (self._sampling or self._early) and self._in_step else []
        active = [self._active] if self._active is not None and self._in_step else []
        return [*fast, *slow, *active]

    def _send(self, *, broken: bool = False) -> None:
        facts, costs = StepFacts(early=self._early), (math.nan, math.nan)
        with self.border:
            facts = StepFacts(
                updates=dict(self.updates),
                learning_rates=dict(self._learning_rates),
                seconds_per_step=self._meter.seconds_per_step,
                early=self._early,
                batches=tuple(self._batches),
            )
            if self._sampling:
                costs = self._meter.recent_shares(self._schedule.cadence)
        for lane in self._measuring():
            with self.border:  # each by itself: other ranks count on all of them
                if isinstance(lane, ActiveLane):
                    if broken or not lane.ask(self.step_count, self.updates):
                        continue
                    if not self._failed:
                        lane.probe(self.step_count)
                lane.send(self.step_count, facts, costs)

    def _receive(self, patience: float | None = None, *, everything: bool = False) -> None:
        """Judges and tells what the step before has shown; calm steps may wait, unless ``everything`` counts."""
        with self.border:
            try:
                if self._aside.busy:
                    self._aside.take(patience)
            except TimeoutError:  # it waits for a rank that will not answer
                return
        if everything or not self._can_wait():
            for lane in self._lanes():
                for _ in range(lane.shelved + 1):  # and not while there is one: one that cannot be had would stay
                    with self.border:  # each by itself: what is not received keeps the next step from being sent
                        self._hear(lane, self.run, self._told_coverage, patience)
        heard, self._heard = self._heard, []
        for lane, received, alerts in heard:
            with self.border:
                # first of all: what fails on one rank only, such as its disk, must not keep it from what all do
                self._decisions.take(alerts, calm=received.calm and self._judge.patient)
                lane.settle(received)
                if self._active is not None:
                    self._active.heed(received.frame)
                if received.frame.sampled:
                    self._after_sample(received)
                # a fault of wiring shows no better in more samples
                if any(a.status == "opened" and a.kind != "wiring" for a in alerts):
                    # counted from the frame, not from now: a resumed job that hears it earlier samples the same steps
                    self._schedule.open_burst(received.frame.step + 2 + (BATCH if received.calm else 0))
                self._outlet.frame(received.frame, alerts)
        left = next((lane.left for lane in self._lanes() if lane.left), None)
        if left is not None and not self._off:
            self._decisions.drop()
            self._switch_off()
            if not self._failed:
                self._failed = left
                self._tell_off(left)

    def _act(self) -> None:
        """Does what alerts ask for, at the end of a step and outside of every border: it is the user's own wish."""
        step = self.step_count - 1
        if not self._decisions.due(step):
            return
        alert = self._decisions.act(step)
        self._meter.pause()  # a checkpoint's time is not a step's
        if alert is not None:
            self.finish(failed=True)
            raise TrainingAlert(alert)

    def _hear_aside(self, run: RunInfo, told: bool) -> None:
        self._outlet.write_due()
        for lane in self._lanes():
            while lane.pending:
                if not lane.ready():
                    return  # all ranks must answer it, and only the training thread starts collectives
                self._hear(lane, run, told)

    def _has_work(self) -> bool:
        """Whether judging is worth waking a thread: for a sample, for steps enough, or where rules are impatient."""
        if self._slow.pending or self._fast.shelved >= BATCH - 1 or (self._active and self._active.pending):
            return True
        return self._fast.pending and not self._judge.patient

    def _can_wait(self) -> bool:
        """Puts the step before on the shelf where nothing in it is urgent; whether nothing else is to be received."""
        with self.border:
            return (
                not self._slow.pending
                and not (self._active and self._active.pending)
                and self._judge.patient
                and not self._failed
                and self._fast.shelved < BATCH - 1
                and self._fast.shelve()
            )
        return False

    def _catch_up(self) -> None:
        """Hears what waits on the shelf; it is told at the end of the step."""
        self._aside.wait()
        if self._aside.busy or self._hearing:  # what is asked for is asked from inside of judging
            return
        with self.border:
            while self._fast.shelved:
                self._hear(self._fast, self.run, self._told_coverage)

    def _hear(self, lane: LeavingLane, run: RunInfo, told: bool, patience: float | None = None) -> None:
        """Receives and judges, and leaves everything else to :meth:`_receive`, so that it can be done in any thread.

        Args:
            lane: Whose message.
            run: Facts of the run.
            told: Whether a first sample has told of attention already.
            patience: Seconds to wait for other ranks.
        """
        received = lane.receive(run, self.segment, patience)
        if received is None:
            return
        self._hearing = True
        try:
            self._heard.append(self._judged(lane, received, run, told))
        finally:
            self._hearing = False

    def _judged(self, lane: LeavingLane, received: Received, run: RunInfo, told: bool) -> _Heard:
        if lane is self._slow and not told and (seen := received.frame.readings.get("attention/max_logit")):
            received = replace(received, frame=replace(received.frame, run=with_attention(run, seen)))
        return lane, received, self._judge.hear(received.frame)

    def _after_sample(self, received: Received) -> None:
        before, (fast_cost, slow_cost) = self._schedule.cadence, received.costs
        if self._schedule.account(fast_cost, slow_cost):
            self._meter.forget_samples()
            if not self._told_backoff:  # once: it goes up and down with the load of the machine
                self._told_backoff = True
                self._tell(
                    f"samples took {slow_cost:.1%} of the step time and all the rest {fast_cost:.1%}: sampling every "
                    f"{self._schedule.cadence} steps now, no longer every {before}, to stay below "
                    f"max_overhead={self.settings.max_overhead}; it adapts from here on without a word"
                )
        if not self._told_coverage:
            self._told_coverage = True
            self.run = received.frame.run
            with self.border:  # one rank writes; what all ranks decide comes after it
                self._outlet.coverage(self.run, self.coverage, received.frame.step)

    def _refuse_loss(self, value: object) -> None:
        if self._refused_loss:
            return
        self._refused_loss = True
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        self._outlet.say(
            f"expected the loss as a tensor with one value, got {got}; loss/value is not recorded, everything else is"
        )


def _data_sets(source: object) -> list[object]:
    if isinstance(source, Mapping):
        return [d for part in source.values() for d in _data_sets(part)]
    if isinstance(source, (list, tuple)):
        return [d for part in source for d in _data_sets(part)]
    return [getattr(source, "dataset", source)]


_Heard = tuple[LeavingLane, Received, list[Alert]]
