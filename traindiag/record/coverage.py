"""What could be measured and what could not: health is only claimed where something was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Sight = Literal["exact", "bound", "unseen"]
"""``exact``: measured; ``bound``: only a bound is known; ``unseen``: nothing is, and silence means nothing."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How one part of the model is seen. A table of them is written once the first sample is known.

    Args:
        family: Family of the signals concerned.
        sight: ``exact``, ``bound`` or ``unseen``.
        places: Names of the layers, optimizers, ... that are seen in this way.
        reason: Why it is not exact; empty where it is.

    Example:
        >>> Coverage("attention", "unseen", ("blocks.3",), "flex attention builds no logits").to_dict()["sight"]
        'unseen'
    """

    family: str
    sight: Sight
    places: tuple[str, ...]
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coverage:
        """Reads :meth:`to_dict` back; fields of a newer version are left out."""
        return cls(data["family"], data["sight"], tuple(data["places"]), data.get("reason", ""))
