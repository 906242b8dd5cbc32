"""Whether critics, actors and encoders can still learn, from forward passes of their own on stored states."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from traindiag.capture.sandbox import sandbox
from traindiag.capture.shadow import intercept
from traindiag.capture.stored_states import batch_size, finite
from traindiag.capture.torch_private import compiled_objects
from traindiag.capture.trainability import STEPS
from traindiag.capture.watched import Watched
from traindiag.monitors.active import ActiveMonitor
from traindiag.monitors.plasticity_module import SPREAD, PlasticityModule
from traindiag.record.catalogue import BY_NAME, near
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_SIGNALS = {s.name.split("/")[1]: s for s in BY_NAME.values() if s.family == "plasticity"}
_MAXIMUM = "q_max_abs"

TRAINABILITY_EVERY = 10
"""Looks from one training of copies to the next: it takes six times ``STEPS``, a look a few forward passes."""

Probe = Tensor | Sequence[Tensor]


class CriticPlasticity(ActiveMonitor):
    """``plasticity/*``: active, dead and dormant units, ranks, norms, values and churn of critics and other modules.

    Looks at modules in a forward pass of its own, in evaluation mode, every ``every`` updates of the optimizer that
    owns them. States are the modules' own inputs, taken from training calls: the first ones stay the same for the
    whole run (for trends), those of the last ``SPREAD`` updates before a look show the present level. Target networks
    and averaged copies, which no optimizer owns, are never looked at.

    The first look comes after ``SPREAD`` updates, when there are states enough; it is what later ones are held
    against.

    Args:
        module: Name of a module that is being trained, or names, or globs: ``"critic"``, ``["critic", "actor"]``.
        probe: States to look at in the place of the first ones seen: what the module is called with, a tensor
            ``[states, ...]`` or several; by the module's name where there are several modules.
        gamma: Discount factor.
        reward_bound: Largest absolute reward, R_max. With ``gamma`` it bounds any return.
        every: Updates from one look to the next.
        states: States of a set. Ranks need at least as many as there are features.
        values: Whether the modules return values; or globs of those that do. A critic that returns atoms or logits of
            a distribution does not.
        trainability: Whether copies are trained on random targets at every tenth look: slow, and the only direct
            measure. A number is that of their steps; True is 300, the source takes 2,000. The first weights are kept
            for it, in checkpoints too.

    Raises:
        ValueError: If an argument is out of its range or the probe is not finite; when the run begins, if a module is
            not there or does not take the probe.
        TypeError: If the probe is no tensor.

    Example:
        >>> monitor = CriticPlasticity("critic", gamma=0.99, reward_bound=1.0)
        >>> monitor.family, monitor.lane
        ('plasticity', 'active')
    """

    name = "plasticity"
    family = "plasticity"
    signals = tuple(_SIGNALS.values())

    def __init__(
        self,
        module: str | Sequence[str],
        *,
        probe: Probe | Mapping[str, Probe] | None = None,
        gamma: float | None = None,
        reward_bound: float | None = None,
        every: int = 500,
        states: int = 1024,
        values: bool | str | Sequence[str] = True,
        trainability: bool | int = False,
    ) -> None:
        self.module = [module] if isinstance(module, str) else list(module)
        if not self.module or not all(isinstance(m, str) for m in self.module):
            raise ValueError(f"module must name at least one module, got {module!r}")
        if gamma is not None and not 0 <= gamma < 1:
            raise ValueError(f"gamma must be at least 0 and below 1, got {gamma!r}")
        if reward_bound is not None and not 0 < reward_bound < float("inf"):
            raise ValueError(f"reward_bound must be finite and above 0, got {reward_bound!r}")
        if reward_bound is not None and gamma is None:
            raise ValueError("reward_bound bounds returns together with gamma; gamma is missing")
        for what, number, least in (("every", every, 1), ("states", states, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{what} must be an integer of at least {least}, got {number!r}")
        self.probe_states = _checked(probe)
        self.gamma, self.reward_bound = gamma, reward_bound
        self.every, self.states = every, states
        self.values: bool | list[str] = (
            [values] if isinstance(values, str) else values if isinstance(values, bool) else list(values)
        )
        if not isinstance(trainability, int) or trainability < 0:
            raise ValueError(f"trainability must be True, False or a number of steps, got {trainability!r}")
        self.trainability = STEPS if trainability is True else int(trainability)
        self._modules: dict[str, PlasticityModule] = {}
        self._owners: tuple[str, ...] = ()
        self._handles: list[Callable[[], None]] = []
        self._unread: Mapping[str, Any] = {}
        self._updates = 0
        self._next = SPREAD
        self._looks = 0
        self._found: dict[str, list[tuple[tuple[str, ...], Tensor, Tensor | None]]] = {}

    # -- what is looked at -------------------------------------------------------------------------

    def prepare(self, watched: Watched) -> None:
        self.close()
        chosen = self._chosen(watched)
        names = {m: n for n, m in watched.modules.items()}
        for name, module in chosen.items():
            known = self._modules.get(name)
            if known is None or known.module is not module:
                self._modules[name] = self._made(name, module, names)
        self._modules = {name: self._modules[name] for name in chosen}
        inside = {id(p) for m in chosen.values() for p in m.parameters()}
        self._owners = tuple(name for name, ps in watched.parameters.items() if any(id(p) in inside for _, p in ps))
        wrappers, _ = compiled_objects()
        for kept in self._modules.values():
            self._listen(kept, next((w for w in wrappers if getattr(w, "_orig_mod", None) is kept.module), None))

    def _chosen(self, watched: Watched) -> dict[str, nn.Module]:
        chosen: dict[str, nn.Module] = {}
        for pattern in self.module:
            found = [n for n in watched.modules if n == pattern] or fnmatch.filter(watched.modules, pattern)
            found = [n for n in found if any(True for _ in watched.modules[n].parameters())]
            if not found:
                frozen = any(n.startswith(f"{pattern}.") for n in watched.frozen)
                why = " No optimizer owns any of its parameters: a target or an averaged copy?" if frozen else ""
                hint = near(pattern, watched.modules)
                raise ValueError(f"module={pattern!r} matches no module that is being trained.{why}{hint}")
            chosen |= {n: watched.modules[n] for n in found}
        return chosen

    def _made(self, name: str, module: nn.Module, names: Mapping[nn.Module, str]) -> PlasticityModule:
        values = (
            self.values if isinstance(self.values, bool) else any(fnmatch.fnmatchcase(name, v) for v in self.values)
        )
        made = PlasticityModule(
            name,
            module,
            names,
            limit=self.states,
            probe=self._probe_of(name),
            values=values,
            trainability=bool(self.trainability),
        )
        if made.given:
            _try(made)
        if name in self._unread:
            made.load_state_dict(self._unread[name])
        return made

    def _probe_of(self, name: str) -> tuple[Tensor, ...] | None:
        if self.probe_states is None or () in self.probe_states:
            return None if self.probe_states is None else self.probe_states[()]
        return next((p for n, p in self.probe_states.items() if n and fnmatch.fnmatchcase(name, n[0])), None)

    def _listen(self, kept: PlasticityModule, wrapper: nn.Module | None) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling() or not self._collects():
                return
            if module.training and torch.is_grad_enabled():
                kept.saw(args, kwargs, near=self._near())

        compiled = wrapper if wrapper is not None else kept.module
        if wrapper is not None or getattr(kept.module, "_compiled_call_impl", None) is not None:
            self._handles.append(intercept(compiled, partial(before, kept.module)))
            return
        handle: RemovableHandle = kept.module.register_forward_pre_hook(before, with_kwargs=True)
        self._handles.append(handle.remove)

    def _collects(self) -> bool:
        """Whether calls are looked at: in the last updates before a look, and until there are states enough."""
        return self._near() or not all(m.settled for m in self._modules.values())

    def _near(self) -> bool:
        """Whether the next look is near."""
        return self._next - self._updates <= SPREAD

    def close(self) -> None:
        for remove in self._handles:
            remove()
        self._handles = []

    def returns(self, states: Probe, returns: Tensor, module: str | None = None) -> None:
        """Returns that were seen after states; the next look tells how much of their variance the values explain.

        Only the last ones handed over before a look count. The values are those at the look, so hand over returns
        that no update has been fitted to since, such as those of evaluation episodes.

        Args:
            states: What the value function is called with, ``[states, ...]``.
            returns: ``[states]``.
            module: Name of the value function where several modules are watched.

        Raises:
            ValueError: If shapes do not fit or there is no such module.
        """
        if module is None and len(self._modules) == 1:
            module = next(iter(self._modules))
        if module not in self._modules:
            raise ValueError(f"module must be one of {', '.join(self._modules)}, got {module!r}")
        kept = self._modules[module]
        tensors = tuple(t.detach().to(kept.device) for t in _as_tensors(states))
        returns = returns.detach().to(kept.device).flatten()
        if len(returns) < 2 or batch_size(tensors) != len(returns):
            raise ValueError(
                f"expected a return for each of at least two states, got {len(returns)} for {batch_size(tensors)}"
            )
        kept.returns = tensors, returns

    # -- when and what -----------------------------------------------------------------------------

    def due(self, step: int, updates: Mapping[str, int]) -> bool:
        self._updates = max((updates.get(name, 0) for name in self._owners), default=0)
        return self._updates >= self._next

    def probe(self, step: int) -> None:
        self._next = (self._updates // self.every + 1) * self.every
        steps = self.trainability if self._looks % TRAINABILITY_EVERY == 0 else 0
        self._looks += 1
        twins = self._twins()
        self._found = {}
        for kept in self._modules.values():
            kept.module.eval()
        for name, kept in self._modules.items():
            self._add("updates", (name,), torch.tensor(float(self._updates), device=kept.device), None)
            for metric, place, value, whole in kept.measure(twins.get(name, ()), steps=steps, seed=self._looks):
                self._add(metric, (name, *place), value, whole)

    def _add(self, metric: str, place: tuple[str, ...], value: Tensor, whole: Tensor | None) -> None:
        self._found.setdefault(metric, []).append((place, value, whole))

    def _twins(self) -> dict[str, list[nn.Module]]:
        """Modules that learn the same as the first of their kind: of the same shapes, and all return values."""
        kinds: dict[object, list[str]] = {}
        for name, kept in self._modules.items():
            if kept.values:
                shapes = tuple(tuple(p.shape) for p in kept.module.parameters())
                kinds.setdefault((type(kept.module), shapes), []).append(name)
        return {first: [self._modules[n].module for n in rest] for first, *rest in kinds.values() if rest}

    def collect(self) -> Sequence[Group]:
        found, self._found = self._found, {}
        groups = []
        for metric, entries in found.items():
            device = entries[0][1].device
            cells = Cells(_SIGNALS[metric].axes, tuple(place for place, _, _ in entries))
            values = torch.stack([v.detach().to(device, torch.float32) for _, v, _ in entries])
            if metric == _MAXIMUM:
                groups.append(Group(metric, cells, maxima={"value": values}))
                continue
            wholes = torch.stack(
                [torch.ones((), device=device) if w is None else w.to(device, torch.float32) for _, _, w in entries]
            )
            groups.append(Group(metric, cells, sums={"value": values, "whole": wholes}))
        return groups

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        readings = []
        for metric, state in states.items():
            signal = _SIGNALS[metric]
            if metric == _MAXIMUM:
                largest, ranks = state.maxima["value"], state.ranks["value"]
                readings.append(Reading.masked(signal, state.cells, largest, state.seen, ranks))
                if self.gamma is not None and self.reward_bound is not None:
                    ratio = largest.astype(np.float64) * (1 - self.gamma) / self.reward_bound
                    readings.append(Reading.masked(_SIGNALS["q_bound_ratio"], state.cells, ratio, state.seen, ranks))
                continue
            wholes = state.sums["whole"]
            some = state.seen & (wholes != 0)  # NaN is not zero
            with np.errstate(invalid="ignore"):
                values = np.divide(state.sums["value"], wholes, out=np.full_like(wholes, np.nan), where=wholes != 0)
            if some.any():
                readings.append(Reading.masked(signal, state.cells, values, some))
        return readings

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "next": self._next,
            "looks": self._looks,
            "updates": self._updates,
            "modules": {name: kept.state_dict() for name, kept in self._modules.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._next, self._looks = int(state["next"]), int(state["looks"])
        self._updates = int(state["updates"])
        self._unread = state["modules"]
        for name, kept in self._modules.items():
            if name in self._unread:
                kept.load_state_dict(self._unread[name])


def _as_tensors(states: object) -> tuple[Tensor, ...]:
    """Positional arguments.

    Raises:
        TypeError: If they are no tensors.
    """
    tensors = (states,) if isinstance(states, Tensor) else tuple(states) if isinstance(states, (tuple, list)) else ()
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"states must be a tensor [states, ...] or several, got {type(states).__name__}")
    return tuple(t for t in tensors if isinstance(t, Tensor))


def _checked(probe: object) -> dict[tuple[str, ...], tuple[Tensor, ...]] | None:
    """Probes by name of a module in a tuple; ``()`` for one that is for all.

    Raises:
        ValueError: If states are missing, of different numbers or not finite.
        TypeError: If a probe is no tensor.
    """
    if probe is None:
        return None
    given = {(str(n),): p for n, p in probe.items()} if isinstance(probe, Mapping) else {(): probe}
    found: dict[tuple[str, ...], tuple[Tensor, ...]] = {}
    for name, states in given.items():
        tensors = tuple(t.detach().clone() for t in _as_tensors(states))
        sizes = [len(t) if t.ndim else 0 for t in tensors]
        if len(set(sizes)) > 1 or sizes[0] < 1:
            raise ValueError(f"probe: every tensor must hold the same states, [states, ...]; got {sizes} states")
        if not finite(tensors):
            raise ValueError("probe: states must be finite, got NaN or infinite ones")
        found[name] = tensors
    return found


def _try(kept: PlasticityModule) -> None:
    """Calls a module with its first states, so that a wrong probe is told before training.

    Raises:
        ValueError: If the module does not take them.
    """
    args, kwargs = next(kept.fixed.batches(2))
    with sandbox([kept.module]):
        kept.module.eval()
        try:
            kept.module(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in next(kept.fixed.batches(len(kept.fixed)))[0])
            raise ValueError(f"probe: {kept.name} does not take states of shape {shapes}: {error}") from error
