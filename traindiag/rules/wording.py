"""Numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """Three or four figures: plain where that is short, a power of ten where it is not.

    Example:
        >>> [number(x) for x in (1234.4, 12345.0, 1e4, 0.01234, 3.0, -2.5e-7, float("nan"))]
        ['1234', '1.23e4', '1e4', '0.0123', '3', '-2.5e-7', 'nan']
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    size = abs(value)
    if 1000 <= size < 9999.5 and float(f"{size:.3g}") != size:
        return f"{value:.0f}"
    if 1e-3 <= size < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def steps(value: float) -> str:
    """A number of steps.

    Example:
        >>> steps(2299.7), steps(float("inf"))
        ('2300', 'inf')
    """
    return f"{value:.0f}"


def in_steps(value: float) -> str:
    """A number of steps with its unit.

    Example:
        >>> in_steps(1.2), in_steps(80)
        ('1 step', '80 steps')
    """
    return f"{steps(value)} step{'' if steps(value) == '1' else 's'}"


def more(others: int) -> str:
    """``, and 4 more cells`` for the end of a sentence, or nothing.

    Example:
        >>> more(1), more(0)
        (', and 1 more cell', '')
    """
    return f", and {others} more cell{'s' * (others > 1)}" if others else ""


def names_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names of a list and how many follow.

    Example:
        >>> names_of(["a", "b", "c"]), names_of(["a", "b", "c", "d", "e"])
        ('a, b, c', 'a, b, c and 2 more')
    """
    left = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {left} more" if left > 0 else "")
