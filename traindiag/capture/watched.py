"""What is watched: modules and parameters under the names that the user knows them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Watched:
    """The part of a program that is being trained.

    Args:
        modules: Watched modules by name, wrapper prefixes stripped.
        parameters: For each optimizer, its parameters as ``(name, parameter)`` in the order of the model.
        optimizers: Optimizers by the name that cells carry.
        frozen: Parameters of the model that no optimizer owns, by name.
        roots: The models as they were given, wrappers and unwatched parts included.
    """

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, tuple[tuple[str, nn.Parameter], ...]]
    optimizers: Mapping[str, Optimizer]
    frozen: Mapping[str, nn.Parameter]
    roots: tuple[nn.Module, ...] = ()

    def in_order(self, called: Sequence[str]) -> Watched:
        """The same with parameters in the order in which their modules were first called.

        Args:
            called: Names of modules in that order. A parameter whose module was never called by itself stays behind
                the one that it follows in the model.
        """
        place = {name: i for i, name in enumerate(called)}

        def ordered(parameters: Sequence[tuple[str, nn.Parameter]]) -> tuple[tuple[str, nn.Parameter], ...]:
            keys, key = [], -1
            for name, _ in parameters:
                key = place.get(name.rpartition(".")[0], key)
                keys.append(key)
            return tuple(parameters[i] for i in sorted(range(len(keys)), key=keys.__getitem__))

        return replace(self, parameters={name: ordered(ps) for name, ps in self.parameters.items()})

    def name_of(self, module: nn.Module) -> str | None:
        """Name of a watched module, None for any other."""
        return next((n for n, m in self.modules.items() if m is module), None)
