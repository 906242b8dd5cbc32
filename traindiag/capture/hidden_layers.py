"""The hidden layers of a module, found by the activation functions that it calls in a forward pass of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from traindiag.capture.outputs import features_last
from traindiag.capture.torch_private import is_plain
from traindiag.functional.plasticity import RECTIFIERS, active_range

_NAMES = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "tanh", "sigmoid", "softsign", "hardtanh", "hardsigmoid",
    "hardswish", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "logsigmoid",
)  # fmt: skip
_SQUASHING = frozenset({"tanh", "sigmoid", "softsign", "hardtanh", "hardsigmoid"})
"""What keeps an output in its range; a module that ends in one has no hidden layer there."""


def _functions() -> dict[Any, str]:
    """Every spelling of an activation function, functions in place and methods included, by its plain name."""
    homes: tuple[Any, ...] = (F, torch, Tensor)
    found: dict[Any, str] = {}
    for name in _NAMES:
        for spelling in (name, f"{name}_"):
            for home in homes:
                if callable(function := getattr(home, spelling, None)):
                    found[function] = name
    return found


_FUNCTIONS = _functions()
_CLAMPS = frozenset({torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min, torch.clip, Tensor.clip})


@dataclass(frozen=True, slots=True)
class HiddenLayer:
    """One call of an activation function.

    Args:
        name: The module whose output goes into it; where that is none, the name of the function in the one called.
        activation: Plain name of the function.
        active: Between which pre-activations a unit is active.
        before: ``[states, ..., units]``, what goes in.
        after: The same shape, what comes out.
    """

    name: str
    activation: str
    active: tuple[float, float]
    before: Tensor
    after: Tensor

    @property
    def rectifies(self) -> bool:
        return self.activation in RECTIFIERS


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass has shown.

    Args:
        output: What the module returned.
        layers: Its hidden layers, in the order of their calls.
        last: Names of those that outputs are computed from without another one between.
        squashed: Layers that only keep an output in its range; they are in ``layers`` too.
    """

    output: Any
    layers: Sequence[HiddenLayer]
    last: frozenset[str]
    squashed: frozenset[str]


def look_inside(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    states: int,
    names: Mapping[nn.Module, str],
) -> Pass:
    """Calls a module and sees every activation function that it calls, as a module, a function or a method.

    Args:
        module: What to call; in a sandbox.
        args: What with.
        kwargs: What with.
        states: Size of the batch.
        names: Names of the module and of what is inside it.
    """
    mode = _Looking(module, states, names)
    handles = mode.name_outputs()
    try:
        with mode:
            output = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    ends = frozenset[str]().union(*(mode.sources.get(t, ()) for t in tensors_of(output)))
    squashed = frozenset(x.name for x in mode.layers if x.name in ends and x.activation in _SQUASHING)
    behind = (mode.behind.get(name, frozenset()) for name in squashed)
    return Pass(output, mode.layers, (ends - squashed).union(*behind), squashed)


class _Looking(TorchFunctionMode):
    """Follows from which layers each tensor was computed."""

    def __init__(self, root: nn.Module, states: int, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.layers: list[HiddenLayer] = []
        self.sources: MutableMapping[Tensor, frozenset[str]] = WeakIdKeyDictionary()
        self.behind: dict[str, frozenset[str]] = {}
        self._made_by: MutableMapping[Tensor, nn.Module] = WeakIdKeyDictionary()
        self._root, self._states, self._names = root, states, names

    def name_outputs(self) -> list[RemovableHandle]:
        """Has every module inside give its name to what it returns; the innermost one counts."""

        def hook(module: nn.Module, _: object, output: object) -> None:
            if isinstance(output, Tensor) and output not in self._made_by:
                self._made_by[output] = module

        return [m.register_forward_hook(hook) for m in self._names if m is not self._root]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        activation = _FUNCTIONS.get(func) or _as_clamp(func, args, kwargs)
        if activation is None:
            out = func(*args, **kwargs)
            origin = frozenset[str]().union(*(self.sources.get(t, ()) for t in tensors_of((args, kwargs))))
            if origin:
                for tensor in tensors_of(out):
                    self.sources[tensor] = origin
            return out
        given = next(tensors_of((args, kwargs)))
        producer = self._made_by.get(given)
        behind = self.sources.get(given, frozenset())
        before = given.clone()  # it may be changed in place
        out = func(*args, **kwargs)
        name = self._name(producer, activation)
        if self._take(name, activation, _settings(activation, args, kwargs), producer or self._root, before, out):
            self.behind[name], self.sources[out] = behind, frozenset({name})
        return out

    def _take(
        self,
        name: str,
        activation: str,
        settings: Mapping[str, Any],
        producer: nn.Module,
        before: Tensor,
        after: Tensor,
    ) -> bool:
        if not (is_plain(before) and before.is_floating_point() and before.ndim > 1):
            return False
        active = settings.get("active") or active_range(activation, **settings)
        if activation == "hardtanh" and active[0] == 0:  # what nn.ReLU6 calls
            activation = "relu6"
        before, after = (self._by_state(producer, t.detach()) for t in (before, after.clone()))
        self.layers.append(HiddenLayer(name, activation, active, before, after))
        return True

    def _by_state(self, producer: nn.Module, tensor: Tensor) -> Tensor:
        """``[states, ..., units]``; members of an ensemble in front of the states are units of their own."""
        n = self._states
        if tensor.shape[0] != n and tensor.ndim == 3 and tensor.shape[1] == n:
            return tensor.transpose(0, 1).flatten(1)
        return features_last(producer, tensor)

    def _name(self, producer: nn.Module | None, activation: str) -> str:
        name = self._names.get(producer) if producer is not None else None
        if name is None:
            root = self._names[self._root]
            name = f"{root}.{activation}" if root else activation
        taken = sum(x.name == name or x.name.startswith(f"{name} call ") for x in self.layers)
        return name if not taken else f"{name} call {taken + 1}"


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


def _as_clamp(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """``clamp(min=0)`` is a rectifier by another name."""
    if function not in _CLAMPS:
        return None
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    return "relu" if isinstance(low, (int, float)) and low == 0 and high is None else None


def _settings(activation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that move the tails."""
    place = {"elu": ("alpha",), "celu": ("alpha",), "softplus": ("beta",), "hardtanh": ("min_val", "max_val")}
    names = place.get(activation, ())
    given = {n: args[i] for i, n in enumerate(names, start=1) if i < len(args)}
    given |= {n: kwargs[n] for n in names if n in kwargs}
    if activation == "hardtanh":
        return {"active": (float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0)))}
    return {n: float(v) for n, v in given.items() if isinstance(v, (int, float))}


def value_heads(output: Any, states: int) -> list[Tensor]:
    """What a value function says, a tensor ``[states, actions]`` for each of its heads; none where it says nothing.

    Heads are the members of a tuple, or of a dimension in front of the states.

    Example:
        >>> twin = (torch.zeros(5, 1), torch.zeros(5, 1))
        >>> [h.shape for h in value_heads(twin, 5)], [h.shape for h in value_heads(torch.zeros(3, 5), 5)]
        ([torch.Size([5, 1]), torch.Size([5, 1])], [torch.Size([5, 1]), torch.Size([5, 1]), torch.Size([5, 1])])
    """
    heads: list[Tensor] = []
    for tensor in tensors_of(output):
        if not tensor.is_floating_point() or not tensor.ndim:
            continue
        if tensor.shape[0] == states:
            heads.append(tensor.reshape(states, -1))
        elif tensor.ndim > 1 and tensor.shape[1] == states:
            heads += [member.reshape(states, -1) for member in tensor]
    return heads
