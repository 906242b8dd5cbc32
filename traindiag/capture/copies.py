"""Target networks, teachers and averaged copies: parameters that no optimizer owns and that change all the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set

from torch import nn

_NAMED = re.compile(r"(^|_)(target|teacher|ema|momentum|average|averaged|polyak|shadow)(_|$)|targ$", re.IGNORECASE)


def copies(roots: Sequence[nn.Module], owned: Set[int]) -> set[int]:
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
            for name, copy in parent.named_children():
                # names first: stacks of hundreds of experts have no such name, and their pairs are many
                if _NAMED.search(name) and owned.isdisjoint(theirs := _ids(copy)):
                    others = (m for m in parent.children() if m is not copy)
                    if any(_alike(m, copy) and _ids(m) <= owned for m in others):
                        found |= theirs
    return found


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and list(_shapes(a)) == list(_shapes(b)) != []


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(p.shape)) for name, p in module.named_parameters())
