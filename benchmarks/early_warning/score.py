"""Alarms against fates: what was warned of in time, how often healthy runs were, with intervals.

Slow, fast and injected failures are never pooled. A lead is told with the recall beside it, and a miss has none.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.fates import FAILED
from benchmarks.early_warning.intervals import clopper_pearson, clustered, poisson_upper

Told = Mapping[str, Any]
Fates = Mapping[str, Told]
Alarms = Mapping[str, Sequence[Alarm]]

NAMED_WITHIN = 3
"""Steps within which an injected fault should be named."""

CLOCKS = ("slow", "fast")
ONSETS = ("material", "strict", "cured")
LEFT = [i / 20 for i in range(21)]
"""Shares of the way to the onset at which the curve is read."""

LOWER_LR = ("lower_lr", "tenth_lr")


@dataclass(frozen=True)
class Sorted:
    """Runs by what they can show.

    Args:
        healthy: Runs on which a warning is false.
        failing: Names by clock, ``injected`` too, and kind. Cured twins are not among them: they answer which family
            is right, and have no answer of their own.
        neither: Slow and grey ones, which enter neither recall nor false alarms.
    """

    healthy: list[str]
    failing: dict[str, dict[str, list[str]]]
    neither: list[str]

    @classmethod
    def of(cls, names: Iterable[str], fates: Fates) -> Sorted:
        """Sorts runs by their fates."""
        found = cls([], defaultdict(lambda: defaultdict(list)), [])
        for name in names:
            told = fates[name]
            if told["injected_at"] is not None:
                found.failing["injected"][told["kind"]].append(name)
            elif told["fate"] == "healthy":
                found.healthy.append(name)
            elif told["fate"] not in FAILED:
                found.neither.append(name)
            elif not told["cure"]:
                found.failing[told["clock"]][told["kind"]].append(name)
        return found

    def all_failing(self, clock: str) -> list[str]:
        """Of one clock, all kinds."""
        return [name for names in self.failing.get(clock, {}).values() for name in names]


def score(fates: Fates, alarms: Alarms, names: Told, hot: Collection[str] = ()) -> dict[str, Any]:
    """Everything that the tables show, for the runs that there are alarms of.

    Args:
        fates: By name of the run.
        alarms: The same.
        names: ``[diagnosis]`` of the protocol: which names are right.
        hot: Runs whose learning rate is near one that fails.
    """
    runs = Sorted.of(alarms, fates)
    ahead = {
        clock: {
            "all": ahead_of(runs.all_failing(clock), fates, alarms, names),
            **{kind: ahead_of(n, fates, alarms, names) for kind, n in sorted(runs.failing[clock].items())},
        }
        for clock in CLOCKS
        if runs.failing[clock]
    }
    injected = {k: after(n, fates, alarms, names) for k, n in sorted(runs.failing["injected"].items())}
    if injected:
        injected = {"all": after(runs.all_failing("injected"), fates, alarms, names), **injected}
    twins = [n for n in runs.healthy if fates[n]["cure"]]
    lines = {
        "all": runs.healthy,
        "controls and variants": [n for n in runs.healthy if not fates[n]["cure"] and n not in hot],
        "hot": [n for n in runs.healthy if not fates[n]["cure"] and n in hot],
        "cured twins": twins,
        "10,000 steps": [n for n in runs.healthy if fates[n]["steps"] >= 10_000],
    }
    return {
        "healthy": {line: false_alarms(n, fates, alarms) for line, n in lines.items() if n},
        "false": {n: sorted({a.rule for a in alarms[n]}) for n in runs.healthy if alarms[n]},
        **ahead,
        "injected": injected,
        "fates": fates_at_cuts(alarms, fates),
        "neither": {
            fate: {"runs": len(n), "share": len(n) / len(alarms), "warned": sum(bool(alarms[m]) for m in n)}
            for fate in ("grey", "slow")
            if (n := [m for m in runs.neither if fates[m]["fate"] == fate])
        },
    }


def false_alarms(names: Sequence[str], fates: Fates, alarms: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Events on healthy runs, a rate per 10,000 steps and a share of runs, each with the widest of its intervals."""
    events = [len(alarms[n]) for n in names]
    steps = [fates[n]["steps"] for n in names]
    false = [int(bool(alarms[n])) for n in names]
    configurations = [fates[n]["configuration"] for n in names]
    rate_high = 1e4 * clustered(events, steps, configurations)[1]
    share_high = clustered(false, [1] * len(names), configurations)[1]
    rules = Counter(a.rule for n in names for a in alarms[n] if isinstance(a, Alarm))
    return {
        "runs": len(names),
        "configurations": len(set(configurations)),
        "steps": sum(steps),
        "events": sum(events),
        "false_runs": sum(false),
        "per_10k": 1e4 * sum(events) / sum(steps),
        "per_10k_below": max(rate_high, 1e4 * poisson_upper(sum(events)) / sum(steps)),
        "share": sum(false) / len(names),
        "share_below": max(share_high, clopper_pearson(sum(false), len(names))[1]),
        "by_rule": dict(rules.most_common()),
    }


def fates_at_cuts(names: Iterable[str], fates: Fates) -> dict[str, Any]:
    """How many runs came to what at which cut; a defect of the protocol is healthy at one and failed at another."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    defects = []
    for name in names:
        ends = {key: fate for key, fate in fates[name].items() if key.startswith("fate")}
        for key, fate in ends.items():
            counts[key.replace("_", " ")][fate] += 1
        if "healthy" in ends.values() and set(ends.values()) & set(FAILED):
            defects.append(name)
    return {**{key: dict(of.most_common()) for key, of in counts.items()}, "healthy_and_failed": defects}


def onset(told: Told, which: str) -> int | None:
    """Step of the failure: ``material``, ``strict``, or ``cured``, the first one that a cured twin shows."""
    if which != "cured":
        return None if told[which] is None else int(told[which])
    seen = [c["material"] for c in told["cures"].values() if c["works"] and c["material"] is not None]
    return min(seen, default=None)


def lead(alarms: Iterable[Alarm], at: int) -> int | None:
    """Steps from the earliest alarm that is still open at an onset; None for none."""
    return max((at - a.told for a in alarms if a.open_at(at)), default=None)


def lead_share(alarms: Iterable[Alarm], at: int) -> float:
    """The same as a share of the way to the onset; 0 for none."""
    return (lead(alarms, at) or 0) / max(1, at)


def right_names(told: Told, names: Told) -> set[str]:
    """Diagnoses that are right for a run: what was done to it, and what the cures that work speak for."""
    working = [cure for cure, twin in told["cures"].items() if twin["works"]]
    working = [cure for cure in working if cure not in LOWER_LR] or working
    return {*names["fault"].get(told["kind"], ()), *(d for cure in working for d in names["cure"].get(cure, ()))}


def ahead_of(runs: Sequence[str], fates: Fates, alarms: Alarms, names: Told) -> dict[str, Any]:
    """Failures of one clock: who was warned, how long before, and whether the right thing was said."""
    found: dict[str, Any] = {"runs": len(runs)}
    for which in ONSETS:
        onsets = {n: at for n in runs if (at := onset(fates[n], which)) is not None}
        found[which] = _before(onsets, fates, alarms, names) if onsets else {"runs": 0}
    material = {n: fates[n]["material"] for n in runs}
    found["warned_late"] = [n for n in runs if alarms[n] and lead(alarms[n], material[n]) is None]
    found["never_warned"] = [n for n in runs if not alarms[n]]
    return found


def _before(onsets: Mapping[str, int], fates: Fates, alarms: Alarms, names: Told) -> dict[str, Any]:
    leads = {n: found for n, at in onsets.items() if (found := lead(alarms[n], at)) is not None}
    shares = [lead_share(alarms[n], at) for n, at in onsets.items()]
    known = [n for n in onsets if fates[n]["families"]]
    open_then = {n: [a for a in alarms[n] if a.open_at(at)] for n, at in onsets.items()}
    rights = {n: right_names(fates[n], names) for n in onsets}
    low, high = clopper_pearson(len(leads), len(onsets))
    return {
        "runs": len(onsets),
        "warned": len(leads),
        "recall": len(leads) / len(onsets),
        "low": low,
        "high": high,
        "mean_lead_share": statistics.mean(shares),
        "median_lead": statistics.median(leads.values()) if leads else None,
        "median_lead_of_run": statistics.median(x / fates[n]["steps"] for n, x in leads.items()) if leads else None,
        "family_known": len(known),
        "right_family": sum(any(a.family in fates[n]["families"] for a in open_then[n]) for n in known),
        "diagnosis_known": sum(bool(right) for right in rights.values()),
        "right_diagnosis": sum(any(a.diagnosis in rights[n] for a in found) for n, found in open_then.items()),
        "warned_with_left": [sum(n in leads and s >= x for n, s in zip(onsets, shares)) / len(onsets) for x in LEFT],
    }


def after(runs: Sequence[str], fates: Fates, alarms: Alarms, names: Told) -> dict[str, Any]:
    """Injected faults, which nothing precedes: how soon a person was told, and whether it was named."""
    delays: dict[str, int] = {}
    named = 0
    for n in runs:
        at, right = fates[n]["injected_at"], right_names(fates[n], names)
        told = [(a.told - at, a) for a in alarms[n] if a.step >= at]
        if told:
            delays[n] = min(delay for delay, _ in told)
        named += any(delay <= NAMED_WITHIN and a.diagnosis in right for delay, a in told)
    within = sum(d <= NAMED_WITHIN for d in delays.values())
    low, high = clopper_pearson(within, len(runs))
    return {
        "runs": len(runs),
        "told": len(delays),
        "within": within,
        "low": low,
        "high": high,
        "named": named,
        "median_delay": statistics.median(delays.values()) if delays else None,
        "before": sum(any(a.step < fates[n]["injected_at"] for a in alarms[n]) for n in runs),
        "missed": [n for n in runs if n not in delays],
    }
