"""Rivals on the same runs, as published and at the rate of false alarms that ours have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.fates import FAILED
from benchmarks.early_warning.intervals import clopper_pearson, clustered
from benchmarks.early_warning.rivals import RIVALS, Config, ConfigurationAlone, Scores, openings
from benchmarks.early_warning.score import CLOCKS, Alarms, Fates, Sorted, false_alarms, lead_share, onset
from benchmarks.early_warning.seen import Seen

FEATURES: Mapping[str, Mapping[str, Callable[[float], float]]] = {
    "configuration alone": {
        "peak_lr": math.log10, "warmup": math.log1p, "eps": math.log10, "qk_norm": float, "norm": float,
    },
    "configuration alone, best learning rate known": {
        "lr_times": math.log10, "warmup": math.log1p, "eps": math.log10, "qk_norm": float, "norm": float,
    },
}  # fmt: skip
"""The second knows what a person knows who has looked for the best learning rate of just this model."""

ONCE = {rival.name for rival in RIVALS if rival.once}
SOURCES = {rival.name: rival.source for rival in RIVALS} | dict.fromkeys(FEATURES, "ours, a control")


@dataclass(frozen=True)
class Fitted:
    """What was learned on the tuning split and is left as it is on any other.

    Args:
        controls: Configuration-only, by name.
        limits: On every rival's score, so that no more healthy tuning runs are false than under our pack; None where
            no limit does that.
    """

    controls: Mapping[str, ConfigurationAlone]
    limits: Mapping[str, float | None]

    @classmethod
    def on(cls, seen: Mapping[str, Seen], fates: Fates, configs: Mapping[str, Config]) -> Fitted:
        """Fits on the tuning split."""
        clear = [n for n in seen if fates[n]["injected_at"] is None and fates[n]["fate"] in (*FAILED, "healthy")]
        failed = [fates[n]["fate"] in FAILED for n in clear]
        controls = {
            name: ConfigurationAlone.fit([configs[n] for n in clear], failed, features=features)
            for name, features in FEATURES.items()
        }
        healthy = Sorted.of(seen, fates).healthy
        allowed = sum(bool(seen[n].alarms) for n in healthy)
        found = scores_of(seen, configs, controls)
        return cls(
            controls,
            {name: limit_for([highest(by_run.get(n)) for n in healthy], allowed) for name, by_run in found.items()},
        )


def scores_of(
    seen: Mapping[str, Seen], configs: Mapping[str, Config], controls: Mapping[str, ConfigurationAlone]
) -> dict[str, dict[str, Scores]]:
    """By rival and run; a run that has not the signals of a rival is missing."""
    found: dict[str, dict[str, Scores]] = {rival.name: {} for rival in RIVALS}
    for run, one in seen.items():
        for name, scores in one.scores.items():
            found[name][run] = scores
    for name, control in controls.items():
        found[name] = {run: control.scores({}, configs[run]) for run in seen}
    return found


def highest(scores: Scores | None) -> float:
    """The largest score of a run; minus infinity where there is none."""
    judged = np.array([]) if scores is None else scores[1][~np.isnan(scores[1])]
    return float(judged.max()) if len(judged) else -math.inf


def limit_for(highest_of_healthy: Sequence[float], allowed: int) -> float | None:
    """The lowest limit at which at most ``allowed`` healthy runs reach it; None where none does.

    Example:
        >>> limit_for([0.2, 0.9, 0.5], 1) > 0.5, limit_for([0.2, 0.9, 0.5], 1) < 0.9, limit_for([float("inf")], 0)
        (True, True, None)
    """
    if allowed >= len(highest_of_healthy):
        return -math.inf
    noisiest_spared = sorted(highest_of_healthy, reverse=True)[allowed]
    if math.isinf(noisiest_spared):
        return None if noisiest_spared > 0 else noisiest_spared
    return math.nextafter(noisiest_spared, math.inf)


def alarms_at(scores: Mapping[str, Scores], runs: Sequence[str], limit: float | None, once: bool) -> Alarms:
    """Openings at a limit. They count from the step itself and are never over, which favours rivals."""

    def one(run: str) -> list[Alarm]:
        if limit is None or run not in scores:
            return []
        steps = openings(scores[run], limit)
        return [Alarm(s, s, None, "warning", "", "", "") for s in (steps[:1] if once else steps)]

    return {run: one(run) for run in runs}


def contest(
    seen: Mapping[str, Seen], fates: Fates, configs: Mapping[str, Config], fitted: Fitted
) -> dict[str, dict[str, Any]]:
    """Every rival, as published and at our budget, beside ours run by run."""
    runs = Sorted.of(seen, fates)
    ours = {n: one.alarms for n, one in seen.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, scores in scores_of(seen, configs, fitted.controls).items():
        limits = {"published": 1.0, "budget": fitted.limits[name]}
        found[name] = {"source": SOURCES[name]}
        for setting, limit in limits.items():
            theirs = alarms_at(scores, list(seen), limit, name in ONCE)
            found[name][setting] = {
                "limit": limit if limit is None or math.isfinite(limit) else None,
                "possible": limit is not None,
                "healthy": false_alarms(runs.healthy, fates, theirs) if runs.healthy else None,
                **{c: beside(runs.all_failing(c), fates, ours, theirs) for c in CLOCKS if runs.failing[c]},
            }
    return found


def beside(names: Sequence[str], fates: Fates, ours: Alarms, theirs: Alarms) -> dict[str, Any]:
    """Recall and mean lead share of a rival, and how much larger our lead share is on the same runs."""
    found: dict[str, Any] = {"runs": len(names)}
    for which in ("material", "strict"):
        onsets = {n: at for n in names if (at := onset(fates[n], which)) is not None}
        warned = sum(any(a.open_at(at) for a in theirs[n]) for n, at in onsets.items())
        shares = [lead_share(theirs[n], at) for n, at in onsets.items()]
        more = [lead_share(ours[n], at) - share for (n, at), share in zip(onsets.items(), shares)]
        low, high = clopper_pearson(warned, len(onsets))
        more_low, more_high = clustered(more, [1] * len(more), [fates[n]["configuration"] for n in onsets])
        found[which] = {
            "warned": warned,
            "recall": warned / len(onsets),
            "low": low,
            "high": high,
            "mean_lead_share": statistics.mean(shares),
            "ours_more": statistics.mean(more),
            "ours_more_low": more_low,
            "ours_more_high": more_high,
        }
    return found
