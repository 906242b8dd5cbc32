"""What is watched, under the names that the user knows: wrapper prefixes go, the user's own attributes stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import Optimizer

from traindiag.capture.watched import Watched
from traindiag.record.catalogue import near

_Entry = tuple[str, nn.Module, "nn.Module | None"]

_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "peft.peft_model.PeftModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
"""Class of a wrapper to the name of its child. By type, so that a user's own attribute ``module`` keeps its name,
and by the name of the type, so that nothing has to be imported."""


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[_Entry]:
    """``(clean name, module, parent)`` in the order of the model, each module once; a wrapper bears the name of what
    it wraps and comes before it.

    Example:
        >>> [name for name, _, _ in named_modules(nn.Sequential(nn.Linear(1, 1)))]
        ['', '0']
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str, parent: nn.Module | None) -> Iterator[_Entry]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module, parent
        inner = _wrapped_child(module)
        children = module.named_children() if inner is None else [(inner, module._modules[inner])]
        for key, child in children:
            if child is not None:
                yield from walk(child, name if key == inner else f"{name}.{key}" if name else key, module)

    yield from walk(model, prefix, None)


def watch(
    model: nn.Module | Mapping[str, nn.Module],
    optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
    patterns: str | Sequence[str] = "*",
) -> Watched:
    """Finds what is being trained.

    Watched are the modules that hold a parameter of some optimizer and their children without parameters; teachers
    and target networks are not. A pattern selects modules together with everything inside them.

    Args:
        model: One model, or several by name; the name then begins the names of its modules.
        optimizers: One, several, or several by name.
        patterns: Glob or globs over clean module names.

    Raises:
        ValueError: For a pattern that matches no watched module, with the nearest names.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> import torch
        >>> watched = watch(net, torch.optim.SGD(net.parameters()))
        >>> list(watched.modules), [name for name, _ in watched.parameters["SGD"]]
        (['Sequential', '0', '1'], ['0.weight', '0.bias'])
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    named = _named_optimizers(optimizers)
    owned = {id(p) for o in named.values() for group in o.param_groups for p in group["params"]}

    walked = [entry for prefix, root in models.items() for entry in named_modules(root, prefix)]
    parameters: dict[str, nn.Parameter] = {}
    met: set[int] = set()
    for name, module, _ in walked:
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in met:
                met.add(id(parameter))
                parameters[f"{name}.{key}" if name else key] = parameter
    trained = owned & met
    if not trained:  # an optimizer over copies or flat shards: all that asks for a gradient is trained
        trained = {id(p) for p in parameters.values() if p.requires_grad}

    modules = _select(_trained_modules(walked, trained), [patterns] if isinstance(patterns, str) else list(patterns))
    return Watched(
        modules=modules,
        parameters={name: _parameters_of(name, optimizer, parameters) for name, optimizer in named.items()},
        optimizers=named,
        frozen={name: p for name, p in parameters.items() if id(p) not in trained},
        roots=tuple(models.values()),
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """What stands inside all wrappers around a module; a module that is no wrapper is its own.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> unwrapped(nn.DataParallel(layer)) is layer
        True
    """
    while (child := _wrapped_child(module)) is not None:
        module = module._modules[child]  # type: ignore[assignment]
    return module


def _wrapped_child(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        child = _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if child is not None and module._modules.get(child) is not None:
            return child
    return None


def _trained_modules(walked: Sequence[_Entry], trained: set[int]) -> dict[str, nn.Module]:
    kept: dict[str, nn.Module] = {}
    kept_ids: set[int] = set()
    for name, module, parent in walked:
        inside = [id(p) for p in module.parameters()]
        if any(i in trained for i in inside) or (not inside and id(parent) in kept_ids):
            kept_ids.add(id(module))
            if _wrapped_child(module) is None:
                kept[name or type(module).__name__] = module
    return kept


def _select(modules: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    chosen: set[int] = set()
    for pattern in patterns:
        found = [m for name, m in modules.items() if fnmatchcase(name, pattern)]
        if not found and (pattern != "*" or len(patterns) > 1):
            raise ValueError(f"watch={pattern!r} matches no module that is being trained.{near(pattern, modules)}")
        chosen.update(id(inner) for m in found for inner in m.modules())
    return {name: m for name, m in modules.items() if id(m) in chosen}


def _named_optimizers(
    optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer],
) -> dict[str, Optimizer]:
    if isinstance(optimizers, Mapping):
        return dict(optimizers)
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    kinds = [type(o).__name__ for o in several]
    total, used = Counter(kinds), Counter[str]()
    named = {}
    for kind, optimizer in zip(kinds, several):
        named[kind if total[kind] == 1 else f"{kind}[{used[kind]}]"] = optimizer
        used[kind] += 1
    return named


def _parameters_of(
    name: str, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[tuple[str, nn.Parameter], ...]:
    places = {
        id(p): f"{name}.param_groups[{g}][{i}]"
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
    }
    own = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    inside = [(n, p) for n, p in parameters.items() if id(p) in own]
    known = {id(p) for _, p in inside}
    return (*inside, *((places[i], p) for i, p in own.items() if i not in known))
