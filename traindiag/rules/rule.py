"""What a rule is: a small state machine over frames that says when something is wrong."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from traindiag.record.cells import Cell
from traindiag.record.frame import Frame

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
Direction = Literal["up", "down", "both"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down", "both")
NOWHERE = Cell((), ())

COOLDOWN = 100
"""Default steps of rest that end an event; what comes back sooner is the same event."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule finds at one step. At most one a rule and frame: cells that fail together are one event.

    Args:
        rule: Name of the rule.
        kind: ``threshold``, ``forecast``, ``spike``, ``nonfinite``, ...; an open string.
        signal: Signal judged.
        step: Step of the frame.
        active: False once, when the condition has ended.
        severity: How bad.
        cell: The worst cell.
        value: Value there, NaN and infinity included.
        limit: What it was held against, or None.
        others: How many more cells fail in the same way.
        steps_to_limit: ``(low, mid, high)`` steps until the limit is crossed, for a forecast.
        rank: Rank that the value came from, where known.
        evidence: One sentence with the numbers that speak for it.
        cooldown: Steps that the condition must have been gone before its event counts as over.
    """

    rule: str
    kind: str
    signal: str
    step: int
    active: bool = True
    severity: Severity = "warning"
    cell: Cell = NOWHERE
    value: float = float("nan")
    limit: float | None = None
    others: int = 0
    steps_to_limit: tuple[float, float, float] | None = None
    rank: int | None = None
    evidence: str = ""
    cooldown: int = COOLDOWN


class Rule(ABC):
    """Base of all rules.

    ``update`` is called with every frame, in step order within a lane. It returns nothing while the signal is
    absent or healthy, one active :class:`Verdict` at every judged frame while the condition holds (persistence
    included), and one inactive verdict when it has ended. A rule keeps all it knows in plain data.
    """

    name: str
    signals: tuple[str, ...]
    """Names of the signals that it reads, checked when the run is set up."""
    cooldown: int = COOLDOWN
    """Steps of rest that end an event of this rule."""
    patient: bool = False
    """Whether it may see a step up to 16 steps late while nothing that is measured every step stirs: no sum is not
    finite, has doubled (and no norm has) over its recent level, or is no longer zero. Frames keep their order
    and their step.
    """

    told_as: Severity | None = None
    """Severity of everything that it says, where the user wants another one than its own."""

    @abstractmethod
    def update(self, frame: Frame) -> Sequence[Verdict]:
        """Judges one frame."""

    def settings(self) -> dict[str, Any]:
        """What the rule was built with, read from attributes that carry the names of the constructor's arguments."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, lists, dicts) that ``torch.load(weights_only=True)`` accepts."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
