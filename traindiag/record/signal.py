"""What a number means: a :class:`Signal` names it, gives its unit, its axes and its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Lane = Literal["fast", "slow", "active"]
"""``fast`` is measured every step, ``slow`` at the sampling cadence, ``active`` when a monitor that runs forward
passes of its own says so."""

Clock = Literal["fast", "slow"]
"""How long a warning leaves: ``fast`` 1-8 steps (spikes), ``slow`` hundreds to thousands (growth)."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One diagnostic number, measured per cell of its axes.

    Args:
        name: ``family/metric``; the part before the first slash is the family.
        axes: What a cell is addressed by, for example ``("layer", "head")``; ``()`` for one number a step.
        summary: One line for tables and tool tips.
        formula: How it is computed, in plain text.
        unit: Unit of the value; ``"1"`` for a pure number.
        lane: Measured every step (``fast``), at the sampling cadence (``slow``) or when its monitor says so
            (``active``).
        clock: The clock of the failure that it predicts.
        worst: Which end is bad; it decides which cell stands for all of them in an aggregate.
        positive: Positive by definition, so that baselines and forecasts work on its logarithm.
        source: Paper and section, or the reason, that the signal rests on.

    Example:
        >>> Signal("attention/max_logit", ("layer", "head"), "largest logit").family
        'attention'
    """

    name: str
    axes: tuple[str, ...]
    summary: str
    formula: str = ""
    unit: str = "1"
    lane: Lane = "slow"
    clock: Clock = "slow"
    worst: Literal["max", "min"] = "max"
    positive: bool = False
    source: str = ""

    @property
    def family(self) -> str:
        return self.name.split("/", 1)[0]
