"""Gradients that vanish on their way through the depth of a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.rules import arguments
from traindiag.rules.alive import is_optional
from traindiag.rules.rule import COOLDOWN, NOWHERE, Rule, Severity, Verdict
from traindiag.rules.wording import number

_NORM = "gradient/block_norm"
_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\..*)?$")


class Vanishing(Rule):
    """Speaks while the first block of a stack gets next to no gradient in comparison with its last.

    A healthy first block at ten times the limit whose norm and the last one's scatter (log-normal of sigma 0.35,
    independent or AR(0.9)) is not told once in 100,000 steps.

    Args:
        ratio: Ratio of the first block's gradient norm to the last one's, below which gradients vanish.
        below: And the first one's norm is below this.
        persistence: Looks in a row.
        every: Looks at every n-th step only.
        cooldown: Steps of rest that end the event.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Zhang et al. 2021, AutoTrainer, ICSE: vanishing below a ratio of 1e-3 with a first norm below 1e-4.
    """

    signals = (_NORM,)
    patient = True

    def __init__(
        self,
        *,
        ratio: float = 1e-3,
        below: float = 1e-4,
        persistence: int = 3,
        every: int = 10,
        cooldown: int = COOLDOWN,
        severity: Severity = "warning",
        name: str = "gradient/vanishing",
    ) -> None:
        arguments.above(0.0, ratio=ratio, below=below)
        arguments.at_least(1, persistence=persistence, every=every)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.ratio, self.below, self.persistence, self.every = ratio, below, persistence, every
        self.cooldown, self.severity, self.name = cooldown, severity, name
        self._ends: tuple[Cells, dict[str, tuple[int, int]]] | None = None
        self._streak: dict[str, int] = {}
        self._active = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(_NORM)
        if reading is None or frame.step % self.every:
            return ()
        if self._ends is None or self._ends[0] is not reading.cells:
            self._ends = reading.cells, ends_of_stacks(reading.cells)
        failing: list[tuple[float, int, int]] = []
        for stack, (first, last) in self._ends[1].items():
            low, high = float(reading.values[first]), float(reading.values[last])
            if not (reading.seen[first] and reading.seen[last] and np.isfinite(low) and np.isfinite(high)):
                continue
            vanishes = high > 0 and low < self.below and low < self.ratio * high
            self._streak[stack] = self._streak.get(stack, 0) + 1 if vanishes else 0
            if self._streak[stack] >= self.persistence:
                failing.append((low / high, first, last))
        if failing:
            self._active = True
            share, first, last = min(failing)
            low = float(reading.values[first])
            evidence = (
                f"{_NORM} of {reading.cells.coordinates[first][-1]} is {number(low)}, {share:.1e} of that of "
                f"{reading.cells.coordinates[last][-1]}, for {self.persistence} looks or more"
            )
            verdict = Verdict(
                self.name,
                "threshold",
                _NORM,
                frame.step,
                True,
                self.severity,
                reading.cells[first],
                low,
                self.ratio * float(reading.values[last]),
                len(failing) - 1,
                evidence=evidence,
                cooldown=self.cooldown,
            )
            return (verdict,)
        if not self._active or any(self._streak.values()):
            return ()
        self._active = False
        healthy = "the first block gets its share of the gradient again"
        return (
            Verdict(
                self.name, "threshold", _NORM, frame.step, False, self.severity, NOWHERE, evidence=healthy,
                cooldown=self.cooldown,
            ),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"streak": dict(self._streak), "active": self._active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._streak = {str(k): int(v) for k, v in state["streak"].items()}
        self._active = bool(state["active"])


def ends_of_stacks(cells: Cells) -> dict[str, tuple[int, int]]:
    """Indices of the first and the last numbered block of each stack of at least two.

    Experts, heads and the like are numbered too, but none comes before another: they are no stack.

    Example:
        >>> blocks = ["embed", "blocks.0", "blocks.1", "head"]
        >>> cells = Cells(("optimizer", "block"), tuple(("a", block) for block in blocks))
        >>> ends_of_stacks(cells)
        {'a blocks': (1, 2)}
    """
    members: dict[str, list[tuple[int, int]]] = {}
    for index, coordinate in enumerate(cells.coordinates):
        found = _NUMBERED.match(str(coordinate[-1])) if coordinate else None
        if found and not is_optional(found[1]):
            stack = f"{coordinate[0]} {found[1]}"
            members.setdefault(stack, []).append((int(found[2]), index))
    return {stack: (min(m)[1], max(m)[1]) for stack, m in members.items() if len(m) > 1}
