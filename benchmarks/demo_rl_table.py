"""What docs/rl_demo.md says of results/demo_rl.json; all of its numbers follow from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import ROOT, between
from traindiag.demo.rl.story import MARGIN

DOCS = ROOT / "docs" / "rl_demo.md"

_LOW = "cartpole, ratio 1"
_HIGH = "cartpole, ratio 4"
_ORDER = ("healthy", "primed", "reset", _LOW, _HIGH)
_SEVERITIES = ("nothing", "warning", "critical")

Found = Mapping[str, Any]


def of_kind(found: Found, kind: str) -> list[Found]:
    """Runs of a kind, by seed."""
    return sorted((r for r in found["runs"] if r["kind"] == kind), key=lambda r: r["seed"])


def worst(run: Found) -> str:
    """The most that was said of plasticity: nothing, warning or critical."""
    told = [line.split(":")[0] for line in run["plasticity"]]
    return max(told, key=_SEVERITIES.index, default="nothing")


def suffers(found: Found) -> list[Found]:
    """Primed runs whose last return is clearly below that of every healthy run."""
    floor = min(r["last"] for r in of_kind(found, "healthy")) - MARGIN
    return [r for r in of_kind(found, "primed") if r["last"] < floor]


def flagged_before(found: Found) -> list[Found]:
    """Those of them that were warned before the return stayed below."""
    from_step = {int(seed): step for seed, step in found["suffers_from"].items()}
    return [
        r
        for r in suffers(found)
        if r["warned_at"] is not None and from_step[r["seed"]] is not None and r["warned_at"] < from_step[r["seed"]]
    ]


def better_with_more_updates(found: Found) -> list[int]:
    """Seeds of CartPole on which four updates a step gave the higher return."""
    low = {r["seed"]: r["last"] for r in of_kind(found, _LOW)}
    return [r["seed"] for r in of_kind(found, _HIGH) if r["seed"] in low and r["last"] > low[r["seed"]]]


def table(found: Found) -> str:
    """One row a run."""
    head = ["run", "seed", "return at the end", "warned at environment step", "return suffers from"]
    head += ["active units, first and last", "worst word on plasticity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind in _ORDER:
        for r in of_kind(found, kind):
            from_step = found["suffers_from"].get(str(r["seed"])) if kind == "primed" else None
            first, last = r["numbers"]["fau_pooled"]
            at = "" if r["warned_at"] is None else f"{r['warned_at']:,}"
            if r["warned_after_updates"] is not None:
                at += f", after {r['warned_after_updates']:,} updates of priming"
            cells = [kind, str(r["seed"]), f"{r['last']:,.0f}", at, "" if from_step is None else f"{from_step:,}"]
            lines.append("| " + " | ".join([*cells, f"{first:.0%}, {last:.0%}", worst(r)]) + " |")
    return "\n".join(lines)


def claims(found: Found) -> str:
    """What may be said, counted."""
    primed, bad, early = of_kind(found, "primed"), suffers(found), flagged_before(found)
    healthy, reset, high = (of_kind(found, kind) for kind in ("healthy", "reset", _HIGH))
    told = [
        f"In {len(bad)} of {len(primed)} primed runs the return at the end is more than {MARGIN:g} below that of the "
        f"worst healthy run; {len(early)} of these were warned before it showed.",
        f"{_count(healthy, 'nothing')} of {len(healthy)} healthy runs heard nothing about plasticity.",
    ]
    if reset:
        floor = min(r["last"] for r in healthy) - MARGIN
        mended = sum(r["last"] >= floor for r in reset)
        told.append(
            f"With fresh weights after the same priming, {mended} of {len(reset)} end among the healthy ones."
        )
    if high:
        better = len(better_with_more_updates(found))
        critical = _count(high, "critical")
        told.append(
            f"On CartPole, four updates a step end with a higher return than one on {better} of {len(high)} seeds; "
            f"{critical or 'none'} of them {'is' if critical == 1 else 'are'} called critical."
        )
    return " ".join(told)


def made_with(found: Found) -> str:
    """Machine and versions."""
    of = found["machine"]
    return (
        f"{of['machine']}, Python {of['python']}, torch {of['torch']}, lightning {of['lightning']}, gymnasium "
        f"{of['gymnasium']}, {of['date']}."
    )


def docs_with(docs: str, found: Found) -> str:
    """The document with what follows from the result."""
    return between(docs, "demo rl", f"{claims(found)}\n\n{table(found)}\n\n{made_with(found)}")


def _count(runs: Sequence[Found], word: str) -> int:
    return sum(worst(r) == word for r in runs)
