"""Judges stored runs and writes what is published.

What is learned (limits of rivals, configuration-only) comes from the tuning split. Every result of the reporting
split stays: a later one needs a reason and goes on top of the earlier ones.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.early_warning.alarms import pack_digest
from benchmarks.early_warning.contest import Fitted, alarms_at, contest, scores_of
from benchmarks.early_warning.cures import cure_rate
from benchmarks.early_warning.fates import FAILED, PROTOCOL, protocol
from benchmarks.early_warning.rivals import LOSS_ALONE
from benchmarks.early_warning.score import Fates, score
from benchmarks.early_warning.seen import Seen, config_of, look_at_all
from benchmarks.early_warning.strata import dealt_anew, first_alarm, known_before, matched
from benchmarks.early_warning.zoo import Run
from benchmarks.machine import machine

RESULT = Path(__file__).parents[1] / "results" / "early_warning.json"
ALL_ROWS = "all rows"
HOT = 3.0
"""A healthy run is hot if its learning rate is within this factor of the lowest that failed in its setting."""


def protocol_digest() -> str:
    """Tells whether fates and results belong to the protocol as it is."""
    return hashlib.sha256(PROTOCOL.read_bytes()).hexdigest()[:16]


def read_fates(path: Path) -> dict[str, dict[str, Any]]:
    """By name of the run.

    Raises:
        ValueError: If they were judged by another protocol.
    """
    told: Mapping[str, Any] = json.loads(path.read_text())
    if told["protocol"] != protocol_digest():
        raise ValueError(f"{path} was judged by another protocol; run python -m benchmarks.early_warning fates")
    return dict(told["runs"])


def judge_runs(plan: Sequence[Run], tuning: Sequence[Run], folder: Path, fates: Fates, jobs: int) -> dict[str, Any]:
    """Everything about the runs of ``plan`` by row, with what is learned on ``tuning``.

    Cured twins that were not trained are left out and counted: without them no family is known to be right.

    Raises:
        ValueError: If any other run has no fate, or a control of the tuning split is missing.
    """
    whole = len(plan)
    plan, tuning = ([r for r in runs if r.name in fates or not r.cure] for runs in (plan, tuning))
    wanted = list({run.name: run for run in [*tuning, *plan]}.values())
    if missing := [run.name for run in wanted if run.name not in fates]:
        raise ValueError(f"{len(missing)} runs have no fate, such as {missing[0]}: train them and judge fates first")
    if old := [run.name for run in wanted if fates[run.name]["recipe"] != run.recipe.digest()]:
        raise ValueError(f"{len(old)} runs were trained by another recipe, such as {old[0]}")
    seen = look_at_all(wanted, folder, jobs)
    configs = {run.name: config_of(run) for run in wanted}
    fitted = Fitted.on({run.name: seen[run.name] for run in tuning}, fates, configs)
    hot = hot_runs(plan, fates)
    rows: dict[str, list[str]] = defaultdict(list)
    for run in plan:
        rows[run.row].append(run.name)
    if len(rows) > 1:
        rows[ALL_ROWS] = [run.name for run in plan]
    return {
        "runs": len(plan),
        "twins_not_trained": whole - len(plan),
        "steps": sum(run.recipe.steps for run in plan),
        "configurations": len({run.configuration for run in plan}),
        "rows": {row: _row({n: seen[n] for n in names}, fates, configs, fitted, hot) for row, names in rows.items()},
    }


def _row(
    seen: Mapping[str, Seen], fates: Fates, configs: Mapping[str, Mapping[str, float]], fitted: Fitted, hot: set[str]
) -> dict[str, Any]:
    constants = protocol()
    ours = {n: one.alarms for n, one in seen.items()}
    scores = scores_of(seen, configs, fitted.controls)
    loss = alarms_at(scores[LOSS_ALONE.name], list(seen), 1.0, once=False)
    probability = {
        name: {run: float(values[0]) for run, (_, values) in scores[name].items()} for name in fitted.controls
    }
    risks = {
        "ours": first_alarm(ours),
        LOSS_ALONE.name: first_alarm(loss),
        **{name: known_before(by_run) for name, by_run in probability.items()},
    }
    return {
        **score(fates, ours, constants["diagnosis"], hot),
        "rivals": contest(seen, fates, configs, fitted),
        "matched": matched(list(seen), fates, risks),
        "dealt_anew": dealt_anew(fates, ours),
        "cure_rate": cure_rate(fates, ours, constants["remedy"]),
    }


def hot_runs(plan: Sequence[Run], fates: Fates) -> set[str]:
    """Runs without a fault whose learning rate is near the lowest that failed in their setting."""
    peaks: dict[str, list[float]] = defaultdict(list)
    for run in plan:
        whole = run.recipe.peak_on == "all" and run.kind in ("none", "learning_rate") and not run.cure
        if whole and fates[run.name]["fate"] in FAILED:
            peaks[_setting(run)].append(run.recipe.peak_times)
    return {
        run.name
        for run in plan
        if run.kind == "none" and _setting(run) in peaks
        if HOT * run.recipe.peak_times >= min(peaks[_setting(run)])
    }


def _setting(run: Run) -> str:
    return run.name.partition(".")[0]


def publish(result: Mapping[str, Any], path: Path, reason: str | None) -> None:
    """Puts a result of the reporting split on top of the earlier ones.

    Raises:
        ValueError: If there is an earlier one and no reason for another.
    """
    history: list[dict[str, Any]] = []
    if path.exists():
        earlier = json.loads(path.read_text())
        if not reason:
            raise ValueError(
                f"the reporting split was judged on {earlier['date']}: say why it is again, with --reason"
            )
        history = [*earlier.pop("history"), earlier]
    found = {
        **machine(),
        "rules": pack_digest(),
        "protocol": protocol_digest(),
        "reason": reason or "the first result",
        **result,
        "history": history,
    }
    path.write_text(json.dumps(_rounded(found), indent=1, allow_nan=False) + "\n")


def _rounded(value: Any) -> Any:
    """Five digits: no share or interval of some hundred runs has more to say."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
