"""What following the advice would have come to: the first remedy of the first alarm, on the same seed and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.intervals import clopper_pearson
from benchmarks.early_warning.score import CLOCKS, Alarms, Fates, Sorted

A_THIRD = "lower_lr"


def advised(alarms: Sequence[Alarm], remedies: Mapping[str, str]) -> str:
    """Name of the cure that the first remedy of the first alarm comes to, or why there is none.

    Args:
        alarms: Of one run.
        remedies: ``[remedy]`` of the protocol.

    Example:
        >>> alarm = Alarm(3, 4, None, "warning", "r", "attention", "", ("optimizer.lr",))
        >>> advised([alarm], {"lr": "lower_lr"}), advised([], {})
        ('lower_lr', 'no warning')
    """
    if not alarms:
        return "no warning"
    first = min(alarms, key=lambda a: (a.told, a.step))
    named = [remedies[s] for setting in first.change if (s := setting.rpartition(".")[2]) in remedies]
    if named:
        return named[0]
    return f"changes {', '.join(first.change)}" if first.change else "changes no setting"


def cure_rate(fates: Fates, alarms: Alarms, remedies: Mapping[str, str]) -> dict[str, Any]:
    """By clock: failing runs whose advised twin was trained and became healthy, beside a third of the learning rate.

    Runs without such a twin are counted under what was advised. ``both`` compares the two on the runs that have both.
    """
    runs = Sorted.of(alarms, fates)
    found = {}
    for clock in CLOCKS:
        names = runs.all_failing(clock)
        if not names:
            continue
        advice = {n: advised(alarms[n], remedies) for n in names}
        tried = [n for n in names if advice[n] in fates[n]["cures"]]
        third = [n for n in names if A_THIRD in fates[n]["cures"]]
        both = [n for n in tried if n in set(third)]
        found[clock] = {
            "runs": len(names),
            "advice": _share([_cured(fates[n], advice[n]) for n in tried]),
            "a third of the learning rate": _share([_cured(fates[n], A_THIRD) for n in third]),
            "both": {
                "advice": _share([_cured(fates[n], advice[n]) for n in both]),
                "a third of the learning rate": _share([_cured(fates[n], A_THIRD) for n in both]),
            },
            "advised": dict(Counter(advice[n] for n in tried).most_common()),
            "not_tried": dict(Counter(advice[n] for n in names if n not in set(tried)).most_common()),
        }
    return found


def _cured(told: Mapping[str, Any], cure: str) -> bool:
    return bool(told["cures"][cure]["fate"] == "healthy")


def _share(cured: Sequence[bool]) -> dict[str, Any]:
    low, high = clopper_pearson(sum(cured), len(cured))
    return {
        "tried": len(cured),
        "healthy": sum(cured),
        "share": sum(cured) / len(cured) if cured else None,
        "low": low,
        "high": high,
    }
