"""Which number stands where in a message: agreed once between ranks, then frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from traindiag.record.cells import Cells
from traindiag.transfer.states import Group, Key


@dataclass(frozen=True, slots=True)
class Slot:
    """The part of a message that holds one group."""

    cells: Cells
    sums: tuple[str, ...]
    maxima: tuple[str, ...]

    @classmethod
    def of(cls, group: Group) -> Slot:
        return cls(group.cells, tuple(group.sums), tuple(group.maxima))

    def covers(self, group: Group) -> bool:
        """Whether every state and cell of ``group`` has its place here."""
        if tuple(group.sums) != self.sums or tuple(group.maxima) != self.maxima:
            return False
        if group.cells is self.cells or group.cells.digest == self.cells.digest:
            return True
        return all(c in self.cells.position for c in group.cells.coordinates)

    def union(self, other: Slot) -> Slot:
        return Slot(
            self.cells.union(other.cells),
            self.sums + tuple(s for s in other.sums if s not in self.sums),
            self.maxima + tuple(m for m in other.maxima if m not in self.maxima),
        )


Layout = Mapping[Key, Slot]


def join(first: Layout, second: Layout) -> dict[Key, Slot]:
    """The slots of ``first`` in their order, widened and followed by what is new in ``second``."""
    joined = dict(first)
    for key, slot in second.items():
        joined[key] = joined[key].union(slot) if key in joined else slot
    return joined


def negotiate(known: Layout, groups: Mapping[Key, Group], world_size: int) -> dict[Key, Slot]:
    """The union of what all ranks know and have; every rank gets the same one.

    A collective when there is more than one rank: call it on all of them or on none.
    """
    mine = join(known, {key: Slot.of(group) for key, group in groups.items()})
    if world_size == 1:
        return mine
    offers: list[dict[Key, Slot] | None] = [None] * world_size
    dist.all_gather_object(offers, mine)
    agreed: dict[Key, Slot] = {}
    for offer in offers:
        agreed = join(agreed, offer or {})
    return agreed
