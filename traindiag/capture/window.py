"""The window of a sampled step: opened before the forward pass, paused in backward, closed with the batch.

Nothing is installed while it is closed. While it is open two global module hooks keep a stack of the modules that
are running, and a function mode is on exactly while the innermost one is watched and trains: teachers, evaluation
and validation run as they would without us (a mode switches the fast path of Transformer layers off, which changes
their last bits).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
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
from traindiag.capture.coverage import COMPILED, attention_coverage, hidden_attention
from traindiag.capture.taps import AttentionCall, Tap
from traindiag.capture.watched import Watched
from traindiag.record.coverage import Coverage, Sight


@dataclass(slots=True)
class _Running:
    """A module on the stack. Modules without parameters share the site of the module around them."""

    module: nn.Module
    site: Site
    name: str | None
    trains: bool
    checkpointed: bool


class Capture:
    """Shows the attention calls of watched modules to the taps, without changing a bit of the run.

    ``prepare`` before the first call of the model; then per sampled step ``open``, ``pause`` and ``resume`` around
    every backward pass, ``close``. All of them may be called twice, and ``close`` cleans up after any exception.
    A layer that is compiled is not looked into: a mode around compiled code recompiles it.

    Args:
        border: Entered by the hooks that run inside the model, to keep errors of ours out of it.
    """

    def __init__(self, border: AbstractContextManager[object] = nullcontext()) -> None:  # noqa: B008  # stateless
        self._border = border
        self._taps: tuple[Tap, ...] = ()
        self._watched: Watched | None = None
        self._names: dict[int, str] = {}
        self._closed_modules: set[int] | None = None
        self._eager_modules: list[nn.Module] | None = None
        self._hidden: dict[str, str] = {}
        self._seen: dict[str, tuple[Sight, str]] = {}
        self._refused: dict[str, str] = {}
        self._order: dict[str, None] = {}
        self._transparent: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

        self._open = self._paused = self._sampled = False
        self._thread = 0
        self._handles: list[RemovableHandle] = []
        self._stack: list[_Running] = []
        self._mode = _Mode(self._call)
        self._mode_on = False
        self._depth: int | None = None

    def prepare(self, watched: Watched, taps: Sequence[Tap]) -> None:
        """Says what to watch and whom to tell; closes the window if it is open."""
        self.close()
        self._watched, self._taps = watched, tuple(taps)
        self._names = {id(m): n for n, m in watched.modules.items()}
        self._closed_modules = None
        self._seen.clear()
        self._refused.clear()
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

    def open(self) -> None:
        """Opens the window. Does nothing if it is open."""
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
                    module.register_forward_pre_hook(self._before_call),
                    module.register_forward_hook(self._after_call, always_call=True),
                ]

    def entered(self, module: nn.Module) -> None:
        """The window was opened from within the call of ``module``, whose own hooks it came too late for."""
        if self._open:
            self._enter(module)

    def pause(self) -> None:
        """Looks away, for a backward pass."""
        self._paused = True
        self._set_mode()

    def resume(self) -> None:
        """Looks again; does nothing where the window is closed."""
        self._paused = False
        self._set_mode()

    def close(self) -> None:
        """Removes everything that ``open`` installed."""
        self._sampled = self._sampled or self._open
        self._open = self._paused = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack.clear()
        self._set_mode()

    # -- which modules run ---------------------------------------------------------------------

    def _before_call(self, module: nn.Module, _: object) -> None:
        if not torch.compiler.is_compiling():
            with self._border:
                self._enter(module)

    def _after_call(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling():
            with self._border:
                self._leave(module)

    def _enter(self, module: nn.Module) -> None:
        if self._looks_away():
            return
        outer = self._stack[-1] if self._stack else None
        name = self._names.get(id(module))
        transparent = self._is_transparent(module)
        checkpointed = False
        if torch.is_grad_enabled():
            trains = True
        else:
            checkpointed = (outer is not None and outer.checkpointed) or torch_private.in_reentrant_checkpoint()
            trains = checkpointed and (outer is None or outer.trains)
        if name is not None:
            self._order.setdefault(name)
        elif transparent and outer is not None:
            name = outer.name
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

    def _leave(self, module: nn.Module) -> None:
        if self._looks_away():
            return
        at = next((i for i in reversed(range(len(self._stack))) if self._stack[i].module is module), None)
        if at is not None:  # a module whose call began before the window is not on the stack
            del self._stack[at:]
            self._set_mode()

    def _looks_away(self) -> bool:
        return not self._open or self._paused or threading.get_ident() != self._thread or torch_private.in_backward()

    def _set_mode(self) -> None:
        top = self._stack[-1] if self._stack else None
        wanted = (
            self._open
            and not self._paused
            and top is not None
            and top.name is not None
            and top.trains
            and id(top.module) not in (self._closed_modules or ())
        )
        if wanted and not self._mode_on:
            torch_private.insert_mode(self._mode, self._depth)
        elif self._mode_on and not wanted:
            self._depth = torch_private.remove_mode(self._mode)
        self._mode_on = wanted
        if not self._stack:
            self._depth = None

    # -- what they call ------------------------------------------------------------------------

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        multi_head = function is F.multi_head_attention_forward
        if torch.compiler.is_compiling() or not (multi_head or function in WATCHED_FUNCTIONS):
            return function(*args, **kwargs)
        top = self._stack[-1] if self._stack and not self._looks_away() else None
        if top is None or not (torch.is_grad_enabled() or torch_private.in_reentrant_checkpoint()):
            return function(*args, **kwargs)
        if not multi_head:
            return run(top.site, top.name or "", function, args, kwargs, self._tell, self._refuse)
        top.site.heads, top.site.query_scale = multi_head_arguments(args, kwargs)
        try:
            with self._replaced():
                return function(*args, **kwargs)
        finally:
            top.site.heads, top.site.query_scale = None, 1.0
            top.site.products.clear()
            top.site.skip_product = False

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
        if exact:
            sight: tuple[Sight, str] = ("exact", "")
        elif call.logsumexp is not None:
            sight = ("bound", "fused kernel: some rows are computed, the others are bounded by their log-sum-exp")
        else:
            sight = ("bound", "fused kernel without log-sum-exp: some rows are computed, the others bounded by norms")
        if self._seen.get(call.layer, sight)[0] != "bound" or sight[0] == "bound":
            self._seen[call.layer] = sight
        for tap in self._taps:
            tap.observe(call)

    def _refuse(self, layer: str, reason: str) -> None:
        self._refused.setdefault(layer, reason)

    # -- where it must not look ----------------------------------------------------------------

    def _find_hidden(self) -> None:
        """Once, as late as possible: models are often compiled after everything else is set up."""
        if self._watched is None or self._closed_modules is not None:
            return
        self._closed_modules, self._hidden = set(), {}
        compiled: set[int] = set()
        wrappers = torch_private.compiled_wrappers()
        roots = self._watched.roots or tuple(self._watched.modules.values())
        for module in (*(m for root in roots for m in root.modules()), *wrappers):
            is_compiled = torch_private.is_compiled(module)
            reason = COMPILED if is_compiled else hidden_attention(module)
            if reason is None:
                continue
            inside = {id(m) for m in module.modules()}
            outermost = next((m for m in module.modules() if id(m) in self._names), None)
            if outermost is not None:
                self._hidden.setdefault(self._names[id(outermost)], reason)
            self._closed_modules |= inside
            if is_compiled:
                compiled |= inside
        # A mode that is on around a closed module would be on in it too.
        closed = frozenset(self._closed_modules)
        for root in roots:
            self._closed_modules |= {id(m) for m in root.modules() if not closed.isdisjoint(map(id, m.modules()))}
        self._eager_modules = None
        if compiled or wrappers:
            every = {id(m): m for root in roots for m in root.modules()}
            self._eager_modules = [m for i, m in every.items() if i not in compiled]


class _Mode(TorchFunctionMode):
    def __init__(self, call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._call(func, args, kwargs or {})
