"""The window of a sampled step: opened before the forward pass, paused in backward, closed with the batch.

Nothing is installed while it is closed. While it is open two global module hooks keep a stack of the modules that
are running, and a function mode is on while the innermost one is watched and trains: teachers, evaluation and
validation run as they would without us (a mode switches the fast path of Transformer layers off, which changes their
last bits). Most losses are computed by no module, so where somebody asks for losses and nothing is compiled, the mode
is on between the calls of modules too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from traindiag.capture import torch_private
from traindiag.capture.attention import (
    REPLACED_IN_MULTI_HEAD,
    WATCHED_FUNCTIONS,
    Site,
    multi_head_arguments,
    run,
)
from traindiag.capture.causal_models import CausalModels
from traindiag.capture.coverage import (
    COMPILED,
    SHADOW,
    attention_coverage,
    hidden_attention,
    module_coverage,
    output_coverage,
)
from traindiag.capture.fused import is_of_the_program, is_weight_of
from traindiag.capture.losses import BACKWARD, LOSS_FUNCTIONS, Losses, Place
from traindiag.capture.outputs import activation_of, features_last
from traindiag.capture.shadow import intercept, run_again
from traindiag.capture.taps import AttentionCall, AttentionTap, LossCall, LossTap, ModuleCall, ModuleTap, Tap
from traindiag.capture.watched import Watched
from traindiag.record.coverage import Coverage, Sight

_NO_TARGETS = "no target z-score, because targets are class probabilities"
_UNKNOWN = "no target z-score, because targets are not known"
_ONLY_HEAD = "no target z-score, because only the output of the head is looked at"


@dataclass(slots=True)
class _Running:
    """A module on the stack. Modules without parameters share the site of the module around them.

    ``name`` is None where nothing is to be looked at, and empty for a module without parameters that is inside of
    none that is watched.
    """

    module: nn.Module
    site: Site
    name: str | None
    trains: bool
    checkpointed: bool


class Capture:
    """Shows attention calls, losses and outputs of watched modules to the taps, without changing a bit of the run.

    ``prepare`` before the first call of the model; then per sampled step ``open``, ``pause`` and ``resume`` around
    every backward pass, ``close``. All of them may be called twice, and ``close`` cleans up after any exception.
    A layer that is compiled is looked at in a second, eager pass over a few rows (:mod:`traindiag.capture.shadow`): a
    mode around compiled code recompiles it.

    Args:
        border: Entered by the hooks that run inside the model, to keep errors of ours out of it.
        meter: Entered while a compiled part runs a second time.
    """

    def __init__(
        self,
        border: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # stateless
        meter: AbstractContextManager[object] = nullcontext(),  # noqa: B008
    ) -> None:
        self._border, self._meter = border, meter
        self._attention_taps: tuple[AttentionTap, ...] = ()
        self._module_taps: dict[int, tuple[str, list[ModuleTap]]] = {}
        self._loss_taps: tuple[LossTap, ...] = ()
        self._head_taps: dict[int, list[LossTap]] = {}
        self._causal_models = CausalModels({})
        self._called_heads: set[int] = set()
        self._watched: Watched | None = None
        self._names: dict[int, str] = {}
        self._closed_modules: set[int] | None = None
        self._compiled_modules: frozenset[int] = frozenset()
        self._eager_modules: list[nn.Module] | None = None
        self._compiled_function = False
        self._shadowed: list[nn.Module] = []
        self._in_shadow = False
        self._restore: list[Callable[[], None]] = []
        self._losses = Losses(self._tell_loss, self._refuse_loss)
        self._seen_losses: dict[str, str] = {}
        self._refused_losses: dict[str, str] = {}
        self._hidden: dict[str, str] = {}
        self._seen: dict[str, tuple[Sight, str]] = {}
        self._refused: dict[str, str] = {}
        self._seen_modules: set[str] = set()
        self._seen_in_shadow: set[str] = set()
        self._refused_modules: dict[str, str] = {}
        self._order: dict[str, None] = {}
        self._transparent: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

        self._open = self._paused = self._sampled = False
        self._thread = 0
        self._handles: list[RemovableHandle] = []
        self._stack: list[_Running] = []
        self._mode = _Mode(self._call)
        self._mode_on = False

    def prepare(self, watched: Watched, taps: Sequence[Tap]) -> None:
        """Says what to watch and whom to tell; closes the window if it is open."""
        self.close()
        self._watched = watched
        self._attention_taps = tuple(t for t in taps if isinstance(t, AttentionTap))
        self._module_taps = {}
        for tap in (t for t in taps if isinstance(t, ModuleTap)):
            for name in tap.modules:
                self._module_taps.setdefault(id(watched.modules[name]), (name, []))[1].append(tap)
        losses = [t for t in taps if isinstance(t, LossTap)]
        self._loss_taps = tuple(t for t in losses if t.head is None)
        self._head_taps = {}
        for loss_tap in losses:
            if loss_tap.head is not None and loss_tap.head in watched.modules:
                self._head_taps.setdefault(id(watched.modules[loss_tap.head]), []).append(loss_tap)
        self._causal_models = CausalModels(watched.modules if losses else {})
        self._losses = Losses(self._tell_loss, self._refuse_loss)
        self._seen_losses.clear()
        self._refused_losses.clear()
        self._names = {id(m): n for n, m in watched.modules.items()}
        self._closed_modules = None
        self._seen.clear()
        self._refused.clear()
        self._seen_modules.clear()
        self._seen_in_shadow.clear()
        self._refused_modules.clear()
        self._order.clear()
        self._sampled = False

    @property
    def forward_order(self) -> tuple[str, ...]:
        """Watched modules in the order in which they were first called."""
        return tuple(self._order)

    def coverage(self) -> tuple[Coverage, ...]:
        """What the windows so far have seen of attention; empty for a model that has none."""
        if self._watched is None:
            return ()
        self._find_hidden()
        return attention_coverage(
            self._watched.modules, self._seen, self._refused, self._hidden, sampled=self._sampled
        )

    def module_coverage(self, family: str, modules: Sequence[str]) -> tuple[Coverage, ...]:
        """What the windows so far have seen of the outputs of ``modules``, for the signals of ``family``."""
        if self._watched is None:
            return ()
        self._find_hidden()
        compiled = {name for name in modules if id(self._watched.modules[name]) in self._compiled_modules}
        return module_coverage(
            family,
            modules,
            self._seen_modules,
            self._seen_in_shadow,
            self._refused_modules,
            compiled,
            sampled=self._sampled,
        )

    def output_coverage(self) -> tuple[Coverage, ...]:
        """What the windows so far have seen of output logits."""
        if self._watched is None:
            return ()
        self._find_hidden()
        heads = {self._names[i]: self._watched.modules[self._names[i]] for i in self._head_taps}
        return output_coverage(
            {name: self._in_eager_code(head) for name, head in heads.items()},
            self._seen_losses,
            self._refused_losses,
            between=self._looks_between,
            sampled=self._sampled,
        )

    def open(self, inside: nn.Module | None = None) -> None:
        """Opens the window. Does nothing if it is open.

        Args:
            inside: A module whose call has just begun, where it is that call that opens the window.
        """
        if self._open or self._watched is None:
            return
        self._find_hidden()
        self._open, self._paused, self._thread = True, False, threading.get_ident()
        if self._eager_modules is None:
            self._handles = [
                register_module_forward_pre_hook(self._before_call),
                register_module_forward_hook(self._after_call, always_call=True),
            ]
        else:  # global hooks would reach into the compiled parts
            for module in self._eager_modules:
                self._handles += [
                    module.register_forward_pre_hook(_copied_alone(self._before_call)),
                    module.register_forward_hook(_copied_alone(self._after_call), always_call=True),
                ]
            self._restore = [intercept(m, partial(self._before_compiled, m)) for m in self._shadowed]
        if self._loss_taps or self._head_taps:
            self._restore.append(torch_private.around_functions(self._call_function))
            self._handles += [
                m.register_forward_hook(_copied_alone(self._after_causal_model), with_kwargs=True)
                for m in self._causal_models.models
                if self._in_eager_code(m)
            ]
        if inside is not None and self._in_eager_code(inside):
            self._enter(inside)
        self._set_mode()

    def pause(self) -> None:
        """Looks away, for a backward pass."""
        if not self._open:
            return
        self._paused = True
        self._forget()
        self._set_mode()

    def resume(self) -> None:
        """Looks again; does nothing where the window is closed."""
        if self._paused:
            self._paused = False
            self._set_mode()

    def close(self) -> None:
        """Removes everything that ``open`` installed."""
        if not self._open:
            self._set_mode()  # where it could not be taken off, because its own call was under way
            return
        self._sampled = True
        self._open = self._paused = False
        for handle in self._handles:
            handle.remove()
        for restore in self._restore:
            restore()
        self._handles, self._restore = [], []
        self._stack.clear()
        self._forget()
        self._set_mode()

    # -- which modules run ---------------------------------------------------------------------

    def _before_call(self, module: nn.Module, _: object) -> None:
        if not torch.compiler.is_compiling():
            with self._border:
                self._enter(module)

    def _after_call(self, module: nn.Module, _: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            with self._border:
                self._leave(module, output)

    def _forget(self) -> None:
        """Lets go of what the losses of a forward pass would have needed."""
        self._losses.forget()
        self._causal_models.forget()
        self._called_heads.clear()

    def _enter(self, module: nn.Module) -> None:
        if self._looks_away():
            return
        outer = self._stack[-1] if self._stack else None
        name = self._names.get(id(module))
        transparent = self._is_transparent(module)
        checkpointed = False
        if torch.is_grad_enabled() or self._in_shadow:
            trains = True
        else:
            checkpointed = (outer is not None and outer.checkpointed) or torch_private.in_reentrant_checkpoint()
            trains = checkpointed and (outer is None or outer.trains)
        if name is not None and trains:
            self._causal_models.enter(module, self._losses.told)
        if name is not None:
            self._order.setdefault(name)
        elif transparent:
            name = outer.name if outer is not None else ""
        if outer is not None and transparent:
            site = outer.site
            if isinstance(module, nn.Softmax):
                name = outer.name
        else:
            site = Site(name or "", module)
        self._stack.append(_Running(module, site, name, trains, checkpointed))
        self._set_mode()

    def _is_transparent(self, module: nn.Module) -> bool:
        """Whether it has no parameters. Remembered: the walk through a module costs more than all else at a call."""
        known = self._transparent.get(module)
        if known is None:
            known = self._transparent[module] = next(module.parameters(), None) is None
        return known

    def _leave(self, module: nn.Module, output: object) -> None:
        if self._looks_away():
            return
        at = next((i for i in reversed(range(len(self._stack))) if self._stack[i].module is module), None)
        if at is not None:  # a module whose call began before the window is not on the stack
            trains = self._stack[at].trains
            if id(module) in self._head_taps:
                self._look_at_head(self._stack[at], output)
            if trains:
                self._causal_models.leave_part(module, output)
            del self._stack[at:]
            self._set_mode()
            if trains and id(module) in self._module_taps:
                self._show(module, output)

    def _looks_away(self) -> bool:
        return not self._open or self._paused or threading.get_ident() != self._thread or torch_private.in_backward()

    def _in_eager_code(self, module: nn.Module) -> bool:
        return self._eager_modules is None or any(m is module for m in self._eager_modules)

    @property
    def _looks_between(self) -> bool:
        """Whether to look between the calls of modules: not where compiled code may run, which a mode recompiles."""
        return bool(self._loss_taps) and self._eager_modules is None and not self._compiled_function

    def _set_mode(self) -> None:
        if not self._mode_on and (self._paused or not self._open):
            return
        if self._mode.busy:  # its own call is under way and will put it back; whatever comes next sets it right
            return
        top = self._stack[-1] if self._stack else None
        if top is None:
            looks = self._looks_between
        else:
            closed = () if self._in_shadow else self._closed_modules or ()
            looks = top.name is not None and top.trains and id(top.module) not in closed
            looks = looks and (top.name != "" or self._looks_between)
        self._mode_on = self._open and not self._paused and looks
        torch_private.set_mode(self._mode, self._mode_on)

    # -- what they call ------------------------------------------------------------------------

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        multi_head = function is F.multi_head_attention_forward
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if function in BACKWARD:
            self._forget()
        if self._loss_taps and function in LOSS_FUNCTIONS and not self._looks_away():
            return self._losses.run(self._place(), function, args, kwargs, trains=self._in_shadow)
        if not (multi_head or function in WATCHED_FUNCTIONS):
            return function(*args, **kwargs)
        top = self._stack[-1] if self._stack and not self._looks_away() else None
        trains = self._in_shadow or torch.is_grad_enabled() or torch_private.in_reentrant_checkpoint()
        if top is None or not top.name or not trains:
            return function(*args, **kwargs)
        if not multi_head:
            return run(top.site, top.name, function, args, kwargs, self._tell, self._refuse)
        top.site.heads, top.site.query_scale = multi_head_arguments(args, kwargs)
        try:
            with self._replaced():
                return function(*args, **kwargs)
        finally:
            top.site.heads, top.site.query_scale = None, 1.0
            top.site.products.clear()
            top.site.skip_product = False

    def _call_function(
        self, function: type, args: tuple[Any, ...], kwargs: dict[str, Any], apply: Callable[..., Any]
    ) -> Any:
        if torch.compiler.is_compiling() or self._looks_away() or not is_of_the_program(function):
            return apply(*args, **kwargs)
        top = self._stack[-1] if self._stack else None
        if top is not None and (top.name is None or not top.trains):
            return apply(*args, **kwargs)
        return self._losses.run_function(
            self._place(), function, args, kwargs, apply, self._head_of, trains=self._in_shadow
        )

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        originals = [(place, name, getattr(place, name)) for place, name in REPLACED_IN_MULTI_HEAD]

        def watching(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self._thread:
                    return original(*args, **kwargs)
                return self._call(original, args, kwargs)

            return call

        try:
            for place, name, original in originals:
                setattr(place, name, watching(original))
            yield
        finally:
            for place, name, original in originals:
                setattr(place, name, original)

    def _tell(self, call: AttentionCall) -> None:
        exact = call.scores is not None
        if self._in_shadow:
            sight: tuple[Sight, str] = ("bound", SHADOW)
        elif exact:
            sight = ("exact", "")
        elif call.logsumexp is not None:
            sight = ("bound", "fused kernel: some rows are computed, the others are bounded by their log-sum-exp")
        else:
            sight = ("bound", "fused kernel without log-sum-exp: some rows are computed, the others bounded by norms")
        if self._seen.get(call.layer, sight)[0] != "bound" or sight[0] == "bound":
            self._seen[call.layer] = sight
        for tap in self._attention_taps:
            tap.observe(call)

    def _show(self, module: nn.Module, output: object) -> None:
        name, taps = self._module_taps[id(module)]
        with torch_private.without_modes(), torch.no_grad():
            activation = activation_of(output)
            if activation is None:
                self._refused_modules.setdefault(name, "returns no floating-point tensor of two or more dimensions")
            elif not torch_private.is_plain(activation):
                self._refused_modules.setdefault(name, f"returns a {type(activation).__name__}, which is not read")
            else:
                (self._seen_in_shadow if self._in_shadow else self._seen_modules).add(name)
                call = ModuleCall(name, features_last(module, activation.detach()))
                for tap in taps:
                    tap.observe(call)

    def _refuse(self, layer: str, reason: str) -> None:
        self._refused.setdefault(layer, reason)

    def _place(self) -> Place:
        top = self._stack[-1] if self._stack else None
        if top is None or not top.name or self._watched is None:
            return Place()
        named = self._watched.modules[top.name]
        is_root = any(named is root for root in self._watched.roots)
        return Place(top.name, getattr(type(named).forward, "__code__", None) if is_root else None)

    def _look_at_head(self, running: _Running, output: object) -> None:
        if not running.trains or output is None:  # None: the call raised
            return
        name = self._names[id(running.module)]
        if not isinstance(output, Tensor) or not torch_private.is_plain(output) or not output.is_floating_point():
            self._refuse_loss(name, f"expected a tensor of logits as its output, got {type(output).__name__}")
            return
        self._called_heads.add(id(running.module))
        self._seen_losses.setdefault(name, _ONLY_HEAD)
        for tap in self._head_taps[id(running.module)]:
            with torch.no_grad():
                tap.observe(LossCall(name, output.detach()))

    def _tell_loss(self, call: LossCall) -> None:
        missing = _NO_TARGETS if call.targets is None else ""
        if call.head:
            missing = f"logits are never built: up to {self._tokens} sampled tokens times {call.head}"
            missing += "" if call.targets is not None else f"; {_UNKNOWN}"
        if self._loss_taps:
            self._seen_losses.setdefault(call.site, missing)
        for tap in self._loss_taps:
            tap.observe(call)
        for head, taps in self._head_taps.items():
            if call.head == self._names[head] and head not in self._called_heads:
                self._seen_losses.setdefault(call.head, missing)
                for tap in taps:
                    tap.observe(replace(call, site=call.head))

    @property
    def _tokens(self) -> int:
        """The most that anybody wants to see of a call."""
        return max(tap.tokens for taps in (self._loss_taps, *self._head_taps.values()) for tap in taps)

    def _head_of(self, weight: Tensor) -> str | None:
        """A head by name before any other, and a layer before the embedding that it shares its weight with."""
        modules = {} if self._watched is None else self._watched.modules
        found = [n for n, m in modules.items() if is_weight_of(m, weight)]
        by_name = [n for n in found if id(modules[n]) in self._head_taps]
        heads = [n for n in found if n in self._causal_models.heads]
        layers = [n for kind in (nn.Linear, nn.Embedding) for n in found if isinstance(modules[n], kind)]
        return next(iter((*by_name, *heads, *layers)), None)

    def _after_causal_model(self, module: nn.Module, _: object, kwargs: dict[str, Any], output: object) -> None:
        """A hook of its own: only such one gets keyword arguments without leaving something behind."""
        if torch.compiler.is_compiling() or self._looks_away():
            return
        with self._border, torch_private.without_modes(), torch.no_grad():
            found = self._causal_models.leave(module, kwargs, output, self._losses.told, tokens=self._tokens)
            if found is None:
                return
            model, head, call = found
            if isinstance(call, LossCall):
                self._tell_loss(call)
            else:
                self._refuse_loss(model if self._loss_taps else head, call)

    def _refuse_loss(self, site: str, reason: str) -> None:
        self._refused_losses.setdefault(site, reason)

    # -- compiled parts ------------------------------------------------------------------------

    def _before_compiled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Shows a compiled part by a second pass, just before its own."""
        idle = self._in_shadow or self._looks_away() or torch.compiler.is_compiling()
        if idle or not (module.training and torch.is_grad_enabled()):
            return
        depth, handles = len(self._stack), []
        with self._border, self._meter:
            try:
                self._in_shadow = True
                handles = [
                    register_module_forward_pre_hook(self._before_call),
                    register_module_forward_hook(self._after_call, always_call=True),
                ]
                run_again(module, args, kwargs)
            except Exception as error:
                self._shadowed.remove(module)
                name = self._name_within(module)
                self._hidden[name] = f"compiled, and a second, eager pass failed: {type(error).__name__}: {error}"
            finally:
                self._in_shadow = False
                for handle in handles:
                    handle.remove()
                del self._stack[depth:]
                self._set_mode()

    def _name_within(self, module: nn.Module) -> str:
        """Name of the outermost watched module in ``module``, which may be a wrapper without a name."""
        return next((self._names[id(m)] for m in module.modules() if id(m) in self._names), "")

    # -- where it must not look ----------------------------------------------------------------

    def _find_hidden(self) -> None:
        """Once, as late as possible: models are often compiled after everything else is set up."""
        if self._watched is None or self._closed_modules is not None:
            return
        self._closed_modules, self._hidden = set(), {}
        compiled: set[int] = set()
        compiled_parts: list[nn.Module] = []
        wrappers, self._compiled_function = torch_private.compiled_objects()
        roots = self._watched.roots or tuple(self._watched.modules.values())
        for module in (*(m for root in roots for m in root.modules()), *wrappers):
            is_compiled = torch_private.is_compiled(module)
            reason = COMPILED if is_compiled else hidden_attention(module)
            if reason is None:
                continue
            inside = {id(m) for m in module.modules()}
            if name := self._name_within(module):
                self._hidden.setdefault(name, reason)
            self._closed_modules |= inside
            if is_compiled:
                compiled |= inside
                if name:
                    compiled_parts.append(module)
        # A mode that is on around a closed module would be on in it too.
        closed = frozenset(self._closed_modules)
        for root in roots:
            self._closed_modules |= {id(m) for m in root.modules() if not closed.isdisjoint(map(id, m.modules()))}
        self._eager_modules = None
        self._compiled_modules = frozenset(compiled)
        parts = {id(m): m for m in compiled_parts}.values()
        self._shadowed = [
            m for m in parts if not any(m is not other and any(m is x for x in other.modules()) for other in parts)
        ]
        if compiled or wrappers:
            every = {id(m): m for root in roots for m in root.modules()}
            self._eager_modules = [m for i, m in every.items() if i not in compiled]


class _Mode(TorchFunctionMode):
    """Hands every call on. ``busy`` counts the calls under way, in which torch has taken the mode off the stack."""

    def __init__(self, call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._call = call
        self.busy = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.busy += 1
        try:
            return self._call(func, args, kwargs or {})
        finally:
            self.busy -= 1


def _copied_alone(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook to place on a module: ``deepcopy`` takes a function as it is, a method with all that it belongs to."""
    return lambda *args, **kwargs: hook(*args, **kwargs)
