"""Checks of what rules are built with: a wrong argument is told at construction, with value and expectation."""

from __future__ import annotations

import numpy as np

from traindiag.rules.rule import DIRECTIONS, SEVERITIES


def at_least(least: int, **counts: int | None) -> None:
    """Refuses counts that are no integers of at least ``least``; None passes.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def above(least: float, **numbers: float | None) -> None:
    """Refuses numbers that are not above ``least`` and representable as float32; None passes.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in numbers.items():
        if value is not None and not least < value <= float(np.finfo(np.float32).max):
            what = "a finite float32" if least == -np.inf else f"a finite float32 above {least:g}"
            raise ValueError(f"{name} must be {what}, got {value!r}")


def share(**shares: float) -> None:
    """Refuses what is no share of a whole.

    Raises:
        ValueError: Names the argument.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def severity(value: str) -> None:
    """Refuses an unknown severity.

    Raises:
        ValueError: With the known ones.
    """
    if value not in SEVERITIES:
        raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {value!r}")


def direction(value: str) -> None:
    """Refuses an unknown direction.

    Raises:
        ValueError: With the known ones.
    """
    if value not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {value!r}")
