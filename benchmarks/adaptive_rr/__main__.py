"""A low replay ratio, a high one, and the one that AdaptiveReplayRatio chooses, on small tasks.

Nothing is tuned: the controller has the paper's numbers, and its interval is the paper's share of a run. Runs that
are in the result file with the same settings are kept, so an interrupted experiment goes on where it stopped.

    python -m benchmarks.adaptive_rr            # trains what is missing; results/adaptive_rr.json and the table
    python -m benchmarks.adaptive_rr tables     # the table of docs/adaptive_replay_ratio.md alone
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.adaptive_rr.tables import write_tables
from benchmarks.adaptive_rr.train import ARMS, STEPS, settings, train
from benchmarks.machine import machine

RESULT = Path(__file__).parents[1] / "results" / "adaptive_rr.json"
SEEDS = tuple(range(8))


def main(arguments: list[str] | None = None) -> int:
    """Seed by seed, so that what is there at any time is balanced; writes after every run."""
    given = sys.argv[1:] if arguments is None else arguments
    if given not in ([], ["tables"]):
        print(__doc__)
        return 2
    plan = [(task, arm, seed) for seed in SEEDS for task in STEPS for arm in ARMS]
    stored: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    runs: list[dict[str, Any]] = stored.get("runs", []) if stored.get("settings") == settings() else []
    for i, (task, arm, seed) in enumerate(plan if not given else (), start=1):
        if not any((r["task"], r["arm"], r["seed"]) == (task, arm, seed) for r in runs):
            runs.append({"task": task, "arm": arm, "seed": seed, **train(task, arm, seed)})
            whole = {"machine": machine("gymnasium"), "settings": settings(), "runs": runs}
            written = RESULT.with_suffix(".part")
            written.write_text(json.dumps(whole, indent=1) + "\n")
            written.replace(RESULT)  # a run that is killed here leaves the old file
            last = {k: v for k, v in runs[-1].items() if k not in ("returns", "fau")}
            print(f"{i} of {len(plan)}: {last}", flush=True)
    write_tables(RESULT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
