"""The table of docs/adaptive_replay_ratio.md; all of it follows from results/adaptive_rr.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adaptive_rr.train import ARMS, settings
from benchmarks.early_warning.intervals import clustered
from benchmarks.tables import ROOT, between

DOCS = ROOT / "docs" / "adaptive_replay_ratio.md"

_NAMES = {"low": "low, {low:g}", "high": "high, {high:g}", "adaptive": "adaptive, {low:g} to {high:g}"}


def table(found: Mapping[str, Any]) -> str:
    """One row a task and arm: returns with intervals over seeds, and the difference from the better fixed ratio."""
    lines = [
        "| task | replay ratio | seeds | return, last quarter | against low | against high | updates | switch at |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in found["settings"]["steps"]:
        runs = {arm: _by_seed(found["runs"], task, arm) for arm in ARMS}
        for arm in ARMS:
            if not runs[arm]:
                continue
            last = [r["last"] for r in runs[arm].values()]
            cells = [
                task.removesuffix("-v1"),
                _NAMES[arm].format(**found["settings"]),
                str(len(last)),
                _interval(last),
                *(_against(runs[arm], runs[other]) if other != arm else "" for other in ("low", "high")),
                f"{round(sum(r['updates'] for r in runs[arm].values()) / len(last)):,}",
                _switches(runs[arm]) if arm == "adaptive" else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(found: Mapping[str, Any]) -> str:
    """What the numbers allow to be said, in one sentence a task."""
    told = []
    for task in found["settings"]["steps"]:
        runs = {arm: _by_seed(found["runs"], task, arm) for arm in ARMS}
        sides = []
        for other in ("low", "high"):
            differences = _differences(runs["adaptive"], runs[other])
            if not differences:
                continue
            low, high = _bounds(differences)
            how = "better than" if low > 0 else "worse than" if high < 0 else "not to be told from"
            sides.append(f"{how} the {other} one")
        told.append(f"{task.removesuffix('-v1')}: the adaptive ratio is {' and '.join(sides)}.")
    return " ".join(told)


def made_with(found: Mapping[str, Any]) -> str:
    """Machine and versions."""
    of = found["machine"]
    seconds = sum(r["cpu_seconds"] for r in found["runs"])
    return (
        f"{len(found['runs'])} runs, {seconds / 60:.0f} minutes of one core; {of['machine']}, Python {of['python']}, "
        f"torch {of['torch']}, gymnasium {of['gymnasium']}, {of['date']}."
    )


def docs_with(docs: str, found: Mapping[str, Any]) -> str:
    """The document with what follows from the result."""
    docs = between(docs, "adaptive rr", f"{table(found)}\n\n{verdict(found)}")
    return between(docs, "adaptive rr made with", made_with(found))


def write_tables(result: Path) -> None:
    """Brings the document up to date."""
    found = json.loads(result.read_text())
    assert found["settings"] == settings(), "these runs were made with other settings"
    DOCS.write_text(docs_with(DOCS.read_text(), found))


def _by_seed(runs: Sequence[Mapping[str, Any]], task: str, arm: str) -> dict[int, Mapping[str, Any]]:
    return {r["seed"]: r for r in runs if (r["task"], r["arm"]) == (task, arm)}


def _differences(
    runs: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]
) -> list[float]:  # fmt: skip
    return [runs[seed]["last"] - others[seed]["last"] for seed in runs if seed in others]


def _against(runs: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]) -> str:
    differences = _differences(runs, others)
    return _interval(differences, signed=True) if differences else ""


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return clustered(values, [1.0] * len(values), range(len(values)))


def _interval(values: Sequence[float], *, signed: bool = False) -> str:
    low, high = _bounds(values)
    mean, form = sum(values) / len(values), "+.0f" if signed else ".0f"
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _switches(runs: Mapping[int, Mapping[str, Any]]) -> str:
    steps = sorted(r["switched_at"] for r in runs.values() if r["switched_at"] is not None)
    never = len(runs) - len(steps)
    told = ", ".join(f"{s:,}" for s in steps)
    return told + (f"{'; ' if told else ''}{never} never" if never else "")
