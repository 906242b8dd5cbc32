"""What the configuration cannot have said: matched strata, and alarms dealt to other runs.

On a ladder of learning rates the configuration alone says nearly everything. So detectors are compared where it does
not vary: among seeds of one configuration that ended differently, and between a run and its cured twin at the same
learning rate.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.fates import FAILED
from benchmarks.early_warning.intervals import clustered
from benchmarks.early_warning.score import CLOCKS, LOWER_LR, Alarms, Fates, Sorted, onset

Pair = tuple[str, str, str]
"""A stratum, a run of it that failed and one that stayed healthy."""

Risk = Callable[[str, int], float]
"""How much a detector holds against a run (by name) by a step."""


def same_configuration(names: Sequence[str], fates: Fates) -> list[Pair]:
    """Seeds of one configuration with different fates."""
    ends: dict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    for n in names:
        told = fates[n]
        if told["injected_at"] is None and told["fate"] in (*FAILED, "healthy"):
            ends[told["configuration"]][told["fate"] in FAILED].append(n)
    return [(c, f, h) for c, by_end in ends.items() for f in by_end[True] for h in by_end[False]]


def with_and_without_cure(names: Sequence[str], fates: Fates) -> list[Pair]:
    """Runs and their twins that a remedy other than a lower learning rate made healthy."""
    return [
        (fates[n]["configuration"], n, twin["run"])
        for n in names
        for cure, twin in fates[n]["cures"].items()
        if cure not in LOWER_LR and twin["fate"] == "healthy" and twin["run"] in names and not fates[n]["cure"]
    ]


def first_alarm(alarms: Alarms) -> Risk:
    """The earlier a run was warned of, the more; nothing for one that was not."""

    def risk(name: str, by: int) -> float:
        return max((-float(a.told) for a in alarms[name] if a.told <= by), default=float("-inf"))

    return risk


def known_before(by_run: Mapping[str, float]) -> Risk:
    """What is held against a run at every step alike."""
    return lambda name, by: by_run[name]


def auc(pairs: Sequence[Pair], fates: Fates, risk: Risk) -> dict[str, float]:
    """Share of pairs in which more is held against the run that fails, at its material onset; ties count half."""
    won = []
    for _, failing, healthy in pairs:
        at = onset(fates[failing], "material")
        assert at is not None
        one, other = risk(failing, at), risk(healthy, at)
        won.append(0.5 if one == other else float(one > other))
    low, high = clustered(won, [1] * len(won), [stratum for stratum, _, _ in pairs])
    return {"auc": statistics.mean(won), "low": low, "high": high}


def matched(names: Sequence[str], fates: Fates, risks: Mapping[str, Risk]) -> dict[str, Any]:
    """Both kinds of strata by the clock of the failing run, one AUC a detector."""
    strata = {
        "seeds of one configuration": same_configuration(names, fates),
        "with and without the cure": with_and_without_cure(names, fates),
    }
    found: dict[str, Any] = {}
    for label, pairs in strata.items():
        for clock in CLOCKS:
            of_clock = [pair for pair in pairs if fates[pair[1]]["clock"] == clock]
            found.setdefault(clock, {})[label] = {
                "strata": len({stratum for stratum, _, _ in of_clock}),
                "pairs": len(of_clock),
                **({name: auc(of_clock, fates, risk) for name, risk in risks.items()} if of_clock else {}),
            }
    return found


def dealt_anew(fates: Fates, alarms: Alarms) -> dict[str, dict[str, float]]:
    """Share of failing runs that the alarms of another run, scaled to their horizon, would have warned of.

    It is the mean over all other runs, so nothing is drawn. What our alarms know of a run is what recall has above
    this: ``failing`` deals among failures of one clock, ``all`` also from healthy runs.
    """
    runs = Sorted.of(alarms, fates)
    found = {}
    for clock in CLOCKS:
        failing = runs.all_failing(clock)
        if len(failing) < 2:
            continue
        donors = {"failing": failing, "all": [*failing, *runs.healthy]}
        found[clock] = {
            "own": statistics.mean(_hit(n, n, fates, alarms) for n in failing),
            **{
                pool: statistics.mean(_hit(n, d, fates, alarms) for n in failing for d in names if d != n)
                for pool, names in donors.items()
            },
        }
    return found


def _hit(run: str, donor: str, fates: Fates, alarms: Alarms) -> bool:
    at, scale = fates[run]["material"], fates[run]["steps"] / fates[donor]["steps"]
    return any(_scaled(a, scale).open_at(at) for a in alarms[donor])


def _scaled(alarm: Alarm, scale: float) -> Alarm:
    closed = None if alarm.closed is None else round(scale * alarm.closed)
    return replace(alarm, told=round(scale * alarm.told), closed=closed)
