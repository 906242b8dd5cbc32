"""Target networks, teachers and averaged copies: parameters that no optimizer owns and that change all the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Sequence

from torch import nn

_NAMED = re.compile(r"(^|_)(target|teacher|ema|momentum|average|averaged|polyak|shadow)(_|$)|targ$", re.IGNORECASE)


def copies(roots: Sequence[nn.Module], owned: Collection[int]) -> set[int]:
    """``id`` of the parameters of modules that follow another one: beside it, alike, called so, owned by nobody.

    The name is asked for because likeness is not enough: blocks of a stack are alike too, and one that was forgotten
    is a fault.

    Args:
        roots: The models.
        owned: ``id`` of parameters that an optimizer owns.

    Example:
        >>> policy = nn.ModuleDict({name: nn.Linear(4, 2) for name in ("q_net", "q_net_target", "other")})
        >>> found = copies([policy], {id(p) for p in policy["q_net"].parameters()})
        >>> found == {id(p) for p in policy["q_net_target"].parameters()}
        True
    """
    found: set[int] = set()
    for root in roots:
        for parent in root.modules():
            for one, (name, other) in itertools.permutations(parent.named_children(), 2):
                if _NAMED.search(name) and _alike(one[1], other):
                    theirs = {id(p) for p in other.parameters()}
                    if theirs.isdisjoint(owned) and {id(p) for p in one[1].parameters()} <= set(owned):
                        found |= theirs
    return found


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and list(_shapes(a)) == list(_shapes(b)) != []


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(p.shape)) for name, p in module.named_parameters())
