"""How early the demo warns, and whether it stays silent on healthy runs, over seeds that nothing was tuned on.

The demo's learning rates and the default rules were chosen on other seeds. Onset comes from the loss alone: the
step at which the smoothed loss leaves the band of five other healthy seeds for good. Runs that are in the result
file under the same rules are kept, so an interrupted benchmark goes on where it stopped.

    python -m benchmarks.demo_lead            # writes benchmarks/results/demo_lead.json
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.early_warning.alarms import pack_digest
from benchmarks.machine import machine
from traindiag import TrainingDiagnostics
from traindiag.demo.band import Band
from traindiag.demo.run import HEALTHY_LR, UNSTABLE_LR, Settings, train
from traindiag.demo.story import Story

RESULT = Path(__file__).parent / "results" / "demo_lead.json"
SEEDS = (5, 6, 7, 8, 9)


def measure(lr: float, seed: int) -> dict[str, Any]:
    """One run with the callback as it comes, except that it never backs off: a slow machine must not change it."""
    diagnostics = TrainingDiagnostics(max_overhead=None, terminal=False)
    story = Story.of(train(Settings(lr=lr, seed=seed), [diagnostics]), diagnostics.alerts, Band.load())
    events = {a.id: a.severity for a in diagnostics.alerts if a.status != "closed"}
    return {
        "lr": lr,
        "seed": seed,
        "warned": None if story.warning is None else story.warning.step,
        "rule": None if story.warning is None else story.warning.rule,
        "onset": story.onset,
        "lead": story.lead,
        "fate": story.fate,
        "validation": round(story.outcome.validation, 4),
        "events": dict(Counter(events.values())),
    }


def main() -> None:
    """Trains what is missing and writes after every run."""
    digest = pack_digest()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    runs: list[dict[str, Any]] = stored.get("runs", []) if stored.get("rules") == digest else []
    done = {(r["lr"], r["seed"]) for r in runs}
    plan = [(lr, seed) for lr in (UNSTABLE_LR, HEALTHY_LR) for seed in SEEDS]
    for i, (lr, seed) in enumerate(plan, start=1):
        if (lr, seed) not in done:
            runs.append(measure(lr, seed))
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps({"machine": machine(), "rules": digest, "runs": runs}, indent=1) + "\n")
        print(f"{i} of {len(plan)}: {next(r for r in runs if (r['lr'], r['seed']) == (lr, seed))}", flush=True)


if __name__ == "__main__":
    main()
