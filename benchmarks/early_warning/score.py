"""Alarms against fates: what was warned of in time, how often healthy runs were, with intervals.

Slow, fast and injected failures are never pooled. A lead is told with the recall beside it, and a miss has none.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import beta, chi2

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.fates import FAILED

Told = Mapping[str, Any]

NAMED_WITHIN = 3
"""Steps within which an injected fault should be named."""

_RESAMPLES = 2000


def score(fates: Mapping[str, Told], alarms: Mapping[str, Sequence[Alarm]]) -> dict[str, Any]:
    """Everything that the tables show, for the runs that there are alarms of."""
    healthy, slow_or_grey = [], []
    failing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in alarms:
        told = fates[name]
        if told["injected_at"] is not None:
            failing["injected", told["kind"]].append(name)
        elif told["fate"] == "healthy":
            healthy.append(name)
        elif told["fate"] in FAILED:
            if not told["cure"]:  # twins answer which family is right, and have no answer of their own
                failing[told["clock"], told["kind"]].append(name)
        else:
            slow_or_grey.append(name)
    clocks = {
        clock: {
            "all": _ahead([n for (c, _), names in failing.items() if c == clock for n in names], fates, alarms),
            **{kind: _ahead(names, fates, alarms) for (c, kind), names in sorted(failing.items()) if c == clock},
        }
        for clock in ("slow", "fast")
        if any(c == clock for c, _ in failing)
    }
    injected = {kind: _delay(names, fates, alarms) for (c, kind), names in sorted(failing.items()) if c == "injected"}
    return {
        "healthy": false_alarms(healthy, fates, alarms),
        **clocks,
        "injected": injected,
        "neither": {
            "runs": len(slow_or_grey),
            "share": len(slow_or_grey) / max(1, len(alarms)),
            "warned": sum(bool(alarms[n]) for n in slow_or_grey),
        },
    }


def false_alarms(names: Sequence[str], fates: Mapping[str, Told], alarms: Mapping[str, Sequence[Alarm]]) -> Told:
    """Events on healthy runs, a rate per 10,000 steps and a share of runs, each with the widest of its intervals."""
    steps = sum(fates[n]["steps"] for n in names)
    events = sum(len(alarms[n]) for n in names)
    runs = sum(bool(alarms[n]) for n in names)
    rules: dict[str, int] = defaultdict(int)
    for n in names:
        for alarm in alarms[n]:
            rules[alarm.rule] += 1
    if not names:
        return {"runs": 0, "steps": 0, "events": 0, "false_runs": 0}
    by_configuration: dict[str, list[str]] = defaultdict(list)
    for n in names:
        by_configuration[fates[n]["configuration"]].append(n)
    groups = [
        (sum(len(alarms[n]) for n in g), sum(fates[n]["steps"] for n in g), sum(bool(alarms[n]) for n in g), len(g))
        for g in by_configuration.values()
    ]
    drawn = np.array(groups, float)[np.random.default_rng(0).integers(0, len(groups), (_RESAMPLES, len(groups)))]
    totals = drawn.sum(axis=1)
    rate_high = float(np.quantile(totals[:, 0] / totals[:, 1], 0.975)) * 1e4
    share_high = float(np.quantile(totals[:, 2] / totals[:, 3], 0.975))
    return {
        "runs": len(names),
        "configurations": len(groups),
        "steps": steps,
        "events": events,
        "false_runs": runs,
        "per_10k": 1e4 * events / steps,
        "per_10k_below": max(rate_high, 1e4 * poisson_upper(events) / steps),
        "share": runs / len(names),
        "share_below": max(share_high, clopper_pearson(runs, len(names))[1]),
        "by_rule": dict(sorted(rules.items(), key=lambda pair: -pair[1])),
    }


def _ahead(names: Sequence[str], fates: Mapping[str, Told], alarms: Mapping[str, Sequence[Alarm]]) -> Told:
    rows: dict[str, Any] = {"runs": len(names)}
    for onset in ("material", "strict"):
        leads, hits, right, known = [], 0, 0, 0
        for n in names:
            told = fates[n]
            at = told[onset]
            before = [a for a in alarms[n] if a.open_at(at)]
            lead = max((at - a.told for a in before), default=None)
            hits += lead is not None
            leads.append((0.0 if lead is None else lead / max(1, at), lead, told["steps"]))
            if told["families"]:
                known += 1
                right += any(a.family in told["families"] for a in before)
        found = [(lead, steps) for _, lead, steps in leads if lead is not None]
        low, high = clopper_pearson(hits, len(names))
        rows[onset] = {
            "warned": hits,
            "recall": hits / len(names),
            "low": low,
            "high": high,
            "mean_lead_share": statistics.mean(share for share, _, _ in leads),
            "median_lead": statistics.median([lead for lead, _ in found]) if found else None,
            "median_lead_of_run": statistics.median([lead / steps for lead, steps in found]) if found else None,
            "family_known": known,
            "right_family": right,
        }
    rows["warned_late"] = sum(
        bool(alarms[n]) and not any(a.open_at(fates[n]["material"]) for a in alarms[n]) for n in names
    )
    rows["never_warned"] = [n for n in names if not alarms[n]]
    return rows


def _delay(names: Sequence[str], fates: Mapping[str, Told], alarms: Mapping[str, Sequence[Alarm]]) -> Told:
    delays = []
    for n in names:
        at = fates[n]["injected_at"]
        after = [a.step - at for a in alarms[n] if a.step >= at]
        delays.append(min(after, default=None))
    found = [d for d in delays if d is not None]
    return {
        "runs": len(names),
        "told": len(found),
        "within": sum(d <= NAMED_WITHIN for d in found),
        "median_delay": statistics.median(found) if found else None,
        "before": sum(any(a.step < fates[n]["injected_at"] for a in alarms[n]) for n in names),
        "missed": [n for n, d in zip(names, delays) if d is None],
    }


def clopper_pearson(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share.

    Example:
        >>> [round(x, 4) for x in clopper_pearson(3, 400)]
        [0.0015, 0.0218]
    """
    if not of:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, of - hits + 1))
    high = 1.0 if hits == of else float(beta.ppf(1 - tail, hits + 1, of - hits))
    return low, high


def poisson_upper(events: int, level: float = 0.95) -> float:
    """Exact upper end of the two-sided interval of a count.

    Example:
        >>> round(poisson_upper(0), 3), round(poisson_upper(6), 2)
        (3.689, 13.06)
    """
    return float(chi2.ppf(1 - (1 - level) / 2, 2 * (events + 1)) / 2)


def as_text(scored: Told) -> str:
    """The tables for a terminal."""
    h = scored["healthy"]
    lines = [
        f"healthy: {h['runs']} runs, {h['steps']:,} steps; {h['events']} events ({h.get('per_10k', 0):.2f} per 10k, "
        f"below {h.get('per_10k_below', 0):.2f}), {h['false_runs']} runs ({h.get('share', 0):.1%}, "
        f"below {h.get('share_below', 0):.1%}) {h.get('by_rule', {})}"
    ]
    for clock in ("slow", "fast"):
        for kind, row in scored.get(clock, {}).items():
            m, s = row["material"], row["strict"]
            ahead = [
                f"{onset} {o['recall']:4.0%}, lead {o['median_lead']}, share {o['mean_lead_share']:.2f}, "
                f"family {o['right_family']}/{o['family_known']}"
                for onset, o in (("material", m), ("strict", s))
            ]
            late = f"late {row['warned_late']}, never {len(row['never_warned'])}"
            lines.append(f"{clock:4} {kind:18} {row['runs']:4} runs | " + " | ".join([*ahead, late]))
    for kind, row in scored["injected"].items():
        lines.append(
            f"injected {kind:18} {row['runs']:4} runs | told {row['told']}, within {NAMED_WITHIN} {row['within']}, "
            f"median delay {row['median_delay']}, warned before {row['before']}"
        )
    n = scored["neither"]
    lines.append(f"slow or grey: {n['runs']} runs ({n['share']:.0%}), {n['warned']} of them warned")
    return "\n".join(lines)
