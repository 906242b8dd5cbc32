"""Aggregates in the rows that the Trainer logs itself: no row and no step more in any of its loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback


class Passengers(TrainerCallback):
    """Aggregates that wait for the Trainer's next row, get in before its loggers see it, and out again after them.

    The Trainer calls its loggers first, then the user's callbacks, then what prints the row. Placed before all of
    them, this one lets aggregates get in; the user's callback lets them get out, so that what is printed and what
    the Trainer keeps in its history stay as they were.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}
        self._riding: tuple[str, ...] = ()

    def wait(self, points: Mapping[str, float], step: int) -> None:
        """Takes aggregates. Of several before the next row the last rides; of a ``_max`` or ``_min`` the worst."""
        for tag, value in points.items():
            self._waiting[tag] = _joined(tag, self._waiting.get(tag), value)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """The Trainer begins to log a row."""
        if logs is not None:
            self._riding = tuple(name for name in self._waiting if name not in logs)
            logs.update((name, self._waiting[name]) for name in self._riding)
            self._waiting.clear()

    def get_out(self, logs: dict[str, Any]) -> None:
        """The loggers have seen the row."""
        for name in self._riding:
            logs.pop(name, None)
        self._riding = ()


def _joined(tag: str, before: float | None, value: float) -> float:
    worst = max if tag.endswith("_max") else min if tag.endswith("_min") else None
    if before is None or worst is None or not math.isfinite(value):
        return value
    return worst(before, value) if math.isfinite(before) else before
