"""Where a model repeats itself: its stacks of blocks, or its layers where it has none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from traindiag.capture.names import unwrapped
from traindiag.capture.watched import Watched


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks of one class that follow each other, such as the layers of a Transformer.

    Args:
        name: Name of the list that holds them, as the user knows it.
        blocks: Names of the watched ones, in order.
    """

    name: str
    blocks: tuple[str, ...]


def stacks_of(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Lists of at least two blocks of one class in a model, wrappers taken off, in the order of the model.

    A list inside a block (experts, branches) is not one of its own, except where the blocks are stages: at least
    three, each with such a list inside, no two with the same number of parameters. Where blocks with layers inside
    are found, lists of bare layers are left out.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)]
        >>> [len(stack) for stack in stacks_of(nn.Sequential(nn.Linear(2, 2), nn.Sequential(*blocks)))]
        [3]
    """
    found = list(_stacks(unwrapped(model), set()))
    return [s for s in found if any(_holds_parameters(child) for child in s[0].children())] or found


def block_stacks(watched: Watched) -> tuple[Stack, ...]:
    """The stacks of the watched models, as far as their blocks are watched.

    Example:
        >>> import torch
        >>> from traindiag.capture.names import watch
        >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))})
        >>> block_stacks(watch(model, torch.optim.SGD(model.parameters()), ["layers.0", "layers.2"]))
        (Stack(name='layers', blocks=('layers.0', 'layers.2')),)
    """
    names = {id(m): n for n, m in watched.modules.items()}
    found: dict[str, Stack] = {}
    for root in watched.roots:
        for members in stacks_of(root):
            blocks = tuple(names[id(m)] for m in members if id(m) in names)
            if blocks:
                name = blocks[0].rpartition(".")[0] or type(unwrapped(root)).__name__
                found.setdefault(name, Stack(name, blocks))
    return tuple(found.values())


def parameter_blocks(watched: Watched) -> dict[str, str]:
    """The block that each optimizer's parameter stands in, by their names.

    What stands outside of all blocks (embeddings, a head, a last norm) goes by the name of the first module on the
    way to it that holds no block; in a model without blocks, by that of the first one that does not hold everything.

    Example:
        >>> import torch
        >>> from traindiag.capture.names import watch
        >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, bias=False)) for _ in range(2))
        >>> body = nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": layers})
        >>> model = nn.ModuleDict({"body": body, "head": nn.Linear(2, 3)})
        >>> parameter_blocks(watch(model, torch.optim.SGD(model.parameters())))["body.layers.1.0.weight"]
        'body.layers.1'
        >>> list(dict.fromkeys(parameter_blocks(watch(model, torch.optim.SGD(model.parameters()))).values()))
        ['body.embed', 'body.layers.0', 'body.layers.1', 'head']
    """
    names = [name for parameters in watched.parameters.values() for name, _ in parameters]
    blocks = [block for stack in block_stacks(watched) for block in stack.blocks]
    if blocks:
        around = {above for block in blocks for above in _above(block)}
    else:
        places = [tuple(name.split(".")[:-1]) for name in names]
        everything = _common(places)
        if everything in places:  # it holds a parameter itself: a single layer, and not what layers stand in
            everything = everything[:-1]
        around = {".".join(everything[:i]) for i in range(1, len(everything) + 1)}
    return {name: next((a for a in _above(name) if a not in around), name) for name in names}


def layers_with_parameters(watched: Watched, at_most: int) -> tuple[str, ...]:
    """The innermost watched modules that hold parameters; where they are too many, evenly spaced ones with both ends.

    Example:
        >>> import torch
        >>> from traindiag.capture.names import watch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
        >>> layers_with_parameters(watch(model, torch.optim.SGD(model.parameters())), at_most=2)
        ('0', '3')
    """
    inner: set[int] = set()
    names = []
    for name, module in watched.modules.items():
        if id(module) in inner or not _holds_parameters(module):
            continue
        # these use the parameters of their children without calling them
        alone = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
        if alone or not any(_holds_parameters(child) for child in module.children()):
            names.append(name)
            inner.update(id(m) for m in module.modules())
    if len(names) <= at_most:
        return tuple(names)
    return tuple(names[round(i * (len(names) - 1) / max(at_most - 1, 1))] for i in range(at_most))


def _above(name: str) -> list[str]:
    """Names of all that a module or parameter stands in, from the outside.

    Example:
        >>> _above("model.layers.0")
        ['model', 'model.layers']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """What all paths begin with."""
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths))
    return tuple(level[0] for level in same)


def _stacks(module: nn.Module, seen: set[int]) -> Iterator[tuple[nn.Module, ...]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    children = tuple(unwrapped(child) for child in module.children())
    inside = [list(_stacks(child, seen)) for child in children]
    if _are_blocks(module, children) and not _are_stages(children, inside):
        yield children
    else:
        yield from (stack for stacks in inside for stack in stacks)


def _are_blocks(module: nn.Module, children: tuple[nn.Module, ...]) -> bool:
    if isinstance(module, nn.ModuleDict):
        counted = all(key.isdigit() for key in module)  # by name it holds models or heads, side by side
    else:
        counted = isinstance(module, (nn.ModuleList, nn.Sequential))
    one_kind = len({type(child) for child in children}) == 1
    return counted and one_kind and len(children) > 1 and all(map(_holds_parameters, children))


def _are_stages(blocks: tuple[nn.Module, ...], inside: list[list[tuple[nn.Module, ...]]]) -> bool:
    sizes = {sum(p.numel() for p in block.parameters()) for block in blocks}
    return all(inside) and len(blocks) > 2 and len(sizes) == len(blocks)


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
