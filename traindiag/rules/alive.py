"""Structural zeros: gradients that are zero by construction, which say nothing until they come alive."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from traindiag.record.cells import Cell, Cells
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.cell_table import CellTable
from traindiag.rules.rule import COOLDOWN, NOWHERE, Rule, Severity, Verdict
from traindiag.rules.wording import names_of

ROUND_OFF = 1e-6
"""Share of the largest gradient RMS of an optimizer below which a gradient is rounding error. Measured in float32 on
GPTs with a key bias (3 layers of width 64 and 6 of width 128, two seeds, 12 steps): the bias, which softmax cancels,
lies between 9e-10 and 1.1e-8, and no other tensor below 1.5e-3. Under bfloat16 autocast rounding error is 4e-5 to
1.3e-4 there, too near to gradients that are only small: it counts as alive."""

AWAKE = 3
"""Samples in a row with a gradient before a cell counts as alive: the first updates of what stood behind a zero move
it a long way (LoRA's B changes by 0.7 of itself at the second step, 0.1 at the tenth)."""


class Alive:
    """Which parameters have a gradient that means something; for any rule on a signal per parameter.

    A cell whose gradient is zero at its first sample, exactly or by round-off, is asleep. It wakes after a few
    samples in a row with a gradient and never sleeps again: what has been alive and falls to zero is to be judged.

    It reads ``gradient/rms`` or, where a loop does not show gradients before clipping, ``gradient/zero_fraction``,
    which knows exact zeros only.

    Args:
        samples: Samples in a row with a gradient after which a cell wakes.
        floor: Share of the largest RMS of the same optimizer below which a gradient is round-off.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.run_info import RunInfo
        >>> cells = Cells(("optimizer", "parameter"), (("adam", "query.bias"), ("adam", "key.bias")))
        >>> rms = Reading(BY_NAME["gradient/rms"], cells, np.float32([1e-3, 1e-11]), np.array([True, True]))
        >>> alive = Alive()
        >>> alive.among(Frame(0, "slow", {"gradient/rms": rms}, RunInfo()), cells).tolist()
        [True, False]
    """

    signals = ("gradient/rms", "gradient/zero_fraction")

    def __init__(self, samples: int = AWAKE, floor: float = ROUND_OFF) -> None:
        arguments.at_least(1, samples=samples)
        arguments.above(0.0, floor=floor)
        self.samples, self.floor = samples, floor
        self._table = CellTable(met=False, asleep=False, count=0)
        self._step: int | None = None

    def look(self, frame: Frame) -> bool:
        """Takes a frame, each once; whether it told anything of gradients."""
        rms, zeros = (frame.readings.get(name) for name in self.signals)
        reading = zeros if rms is None else rms
        if reading is None:
            return False
        if frame.step == self._step:
            return True
        self._step = frame.step
        table = self._table
        values, seen = table.align(reading)
        zero = values >= 1 if rms is None else values <= self.floor * self._largest(values, seen)
        has = ~zero  # NaN is no zero
        met, asleep, count = table["met"], table["asleep"], table["count"]
        asleep |= seen & ~met & ~has
        met |= seen
        np.copyto(count, np.where(has, count + 1, 0), where=seen)
        asleep &= count < self.samples
        return True

    def among(self, frame: Frame, cells: Cells) -> BoolArray:
        """Bool ``[n]``: which of ``cells`` are to be judged; all that never were asleep. Takes the frame too."""
        self.look(frame)
        table = self._table
        if table.cells is None or not table["asleep"].any():
            return np.ones(len(cells), np.bool_)
        position = table.cells.position
        at = np.array([position.get(c, -1) for c in cells.coordinates], np.intp)
        awake: BoolArray = (at < 0) | ~table["asleep"][at]
        return awake

    @property
    def asleep(self) -> list[Cell]:
        """Cells that are left out for now."""
        cells = self._table.cells
        return [] if cells is None else [cells[int(i)] for i in np.flatnonzero(self._table["asleep"])]

    def _largest(self, values: FloatArray, seen: BoolArray) -> FloatArray:
        """Of each cell's optimizer, ``[n]``; what is not finite is left out."""
        assert self._table.cells is not None
        owner = np.array([c[0] for c in self._table.cells.coordinates])
        usable = np.where(seen & np.isfinite(values), values, 0)
        largest = np.zeros_like(values)
        for name in np.unique(owner):
            largest[owner == name] = usable[owner == name].max()
        return largest

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self._table.load_state_dict(state["table"])


def idle_members(cells: Cells, ungraded: BoolArray) -> BoolArray:
    """Which cells without a gradient belong to experts or heads that a step simply did not use.

    Those are numbered members of a list of experts, heads, branches, tasks or adapters, of which no parameter has a
    gradient while another member of the list has one. The layers of a chain are numbered too, and there a missing
    gradient is a fault, so the name of the list has to tell.

    Args:
        cells: The last axis is ``parameter``; ``n`` of them.
        ungraded: ``[n]``.

    Example:
        >>> cells = Cells.along("parameter", ["heads.0.weight", "heads.1.weight", "mlp.0.weight", "mlp.2.weight"])
        >>> idle_members(cells, np.array([False, True, False, True])).tolist()
        [False, True, False, False]
    """
    members = [_member(str(c[-1])) for c in cells.coordinates]
    used = {m for m, without in zip(members, ungraded) if m is not None and not without}
    lists = {place for place, _ in used}
    return np.array(
        [bool(u) and m is not None and m not in used and m[0] in lists for m, u in zip(members, ungraded)], np.bool_
    )


_OPTIONAL = re.compile(r"expert|heads$|branches$|tasks$|adapters$", re.I)


def is_optional(name: str) -> bool:
    """Whether a list of this name holds alternatives, not the layers of a chain.

    Example:
        >>> [is_optional(name) for name in ("mlp.experts", "q_heads", "blocks")]
        [True, True, False]
    """
    return bool(_OPTIONAL.search(name.rpartition(".")[2]))


@lru_cache(maxsize=2**16)
def _member(name: str) -> tuple[str, int] | None:
    """The innermost such list that a parameter is inside of, and its number there."""
    parts = name.split(".")
    for i in reversed(range(1, len(parts))):
        if parts[i].isdecimal() and is_optional(parts[i - 1]):
            return ".".join(parts[:i]), int(parts[i])
    return None


class StructuralZeros(Rule):
    """Names, once and as info, the parameters that get no gradient so far and are left out until they come alive.

    Such are key biases without rotary embedding (softmax cancels them), LoRA's A at the first step, what stands
    behind a zero-initialised branch, and experts that no token has reached.

    Args:
        samples: Samples in a row with a gradient after which a parameter is judged.
        cooldown: Steps of rest that end the event.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If ``samples`` is below 1.
    """

    signals = (*Alive.signals, "wiring/ungraded")

    def __init__(
        self, *, samples: int = AWAKE, cooldown: int = COOLDOWN, name: str = "gradient/structural-zeros"
    ) -> None:
        arguments.at_least(0, cooldown=cooldown)
        self.samples, self.cooldown, self.name = samples, cooldown, name
        self._alive = Alive(samples)
        self._idle = CellTable(met=False, idle=False)
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        if frame.readings.keys().isdisjoint(self.signals):
            return ()
        self._alive.look(frame)
        if (ungraded := frame.readings.get("wiring/ungraded")) is not None:
            self._follow_idle(ungraded)
        found = self._alive.asleep
        if self._idle.cells is not None:
            found = found + [self._idle.cells[int(i)] for i in np.flatnonzero(self._idle["idle"])]
        if not found:
            was, self._open = self._open, False
            return (self._verdict(frame, (), active=False),) if was else ()
        self._open = True
        return (self._verdict(frame, found),)

    def _follow_idle(self, reading: Reading) -> None:
        """Idle from their first sample on, until they get a gradient."""
        table = self._idle
        values, seen = table.align(reading)
        met, idle = table["met"], table["idle"]
        ungraded = seen & (values == 1)
        new = ungraded & ~met
        if new.any():
            assert table.cells is not None
            idle |= new & idle_members(table.cells, ungraded)
        met |= seen
        idle &= ~(seen & (values == 0))

    def _verdict(self, frame: Frame, found: Sequence[Cell], *, active: bool = True) -> Verdict:
        info: Severity = "info"
        if active:
            one = len(found) == 1
            evidence = f"{len(found)} parameter{'' if one else 's'} get{'s' if one else ''} no gradient so far: "
            evidence += f"{names_of([str(c.coordinates[-1]) for c in found])}; left out until "
            evidence += "it comes alive" if one else "they come alive"
        else:
            evidence = "all parameters get a gradient"
        return Verdict(
            self.name,
            "wiring",
            "gradient/rms",
            frame.step,
            active,
            info,
            found[0] if found else NOWHERE,
            0.0,
            others=max(0, len(found) - 1),
            evidence=evidence,
            cooldown=self.cooldown,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open, "alive": self._alive.state_dict(), "idle": self._idle.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open = bool(state["open"])
        self._alive.load_state_dict(state["alive"])
        self._idle.load_state_dict(state["idle"])
