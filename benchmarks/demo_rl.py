"""Whether the RL demo's primed critic truly fails, whether fresh weights mend it, and how early it is told.

The demo was made on seeds 0 to 5; these are others. A primed run suffers from the environment step at which its
return stays clearly below that of the worst healthy run. Reset runs are primed too, and then given fresh weights.
Beside it: CartPole with one update a step and with four, which learns better (seen on seeds 0 to 2). Runs that
are in the result file under the same rules are kept, so an interrupted benchmark goes on where it stopped.

    python -m benchmarks.demo_rl            # trains what is missing; results/demo_rl.json and docs/rl_demo.md
    python -m benchmarks.demo_rl tables     # docs/rl_demo.md alone
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.demo_rl_table import DOCS, docs_with
from benchmarks.machine import machine
from traindiag import TrainingDiagnostics
from traindiag.demo.rl.agent import AgentSettings
from traindiag.demo.rl.run import PRIMING, Settings, train
from traindiag.demo.rl.show import monitor
from traindiag.demo.rl.story import MARGIN, Story, onset
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule_set import RuleSet

RESULT = Path(__file__).parent / "results" / "demo_rl.json"
SEEDS = (20, 21, 22, 23, 24)
CARTPOLE_SEEDS = (30, 31, 32)

_CARTPOLE = Settings(AgentSettings(task="CartPole-v1"), steps=10_000)
KINDS: dict[str, Settings] = {
    "healthy": Settings(),
    "primed": Settings(priming=PRIMING),
    "reset": Settings(priming=PRIMING, reset=True),
    "cartpole, ratio 1": _CARTPOLE,
    "cartpole, ratio 4": replace(_CARTPOLE, ratio=4.0),
}


PLAN = (
    (("healthy", "primed", "reset"), SEEDS),
    (("cartpole, ratio 1", "cartpole, ratio 4"), CARTPOLE_SEEDS),
)


def rules_digest() -> str:
    """Of the rules on plasticity: nothing else is claimed here."""
    return RuleSet([rule for rule in default_rules() if rule.name.startswith("plasticity/")]).digest()


def measure(kind: str, seed: int) -> dict[str, Any]:
    """One run with the callback as it comes, except that it never backs off: a slow machine must not change it."""
    settings = KINDS[kind]
    settings = replace(settings, agent=replace(settings.agent, seed=seed))
    diagnostics = TrainingDiagnostics(monitors=[monitor(settings)], max_overhead=None, terminal=False)
    began = time.process_time()
    outcome = train(settings, [diagnostics])
    seconds = time.process_time() - began
    story = Story.of(outcome, diagnostics.alerts, diagnostics.history)
    told = [a for a in diagnostics.alerts if a.status != "closed" and a.severity != "info"]
    critical = next((a for a in told if a.family == "plasticity" and a.severity == "critical"), None)
    return {
        "kind": kind,
        "seed": seed,
        "last": round(outcome.last, 1),
        "warned_at": story.warned_at,
        "warned_after_updates": _updates(story, settings),
        "critical_at": None if critical is None else settings.env_step(critical.step),
        "plasticity": sorted({f"{a.severity}: {a.rule}" for a in told if a.family == "plasticity"}),
        "others": sorted({f"{a.severity}: {a.rule}" for a in told if a.family != "plasticity"}),
        "numbers": {name: [round(v, 3) for v in pair] for name, pair in story.numbers.items()},
        "cpu_seconds": round(seconds, 1),
        "returns": [(step, round(value, 1)) for step, value in outcome.returns],
    }


def _updates(story: Story, settings: Settings) -> int | None:
    """Updates of priming before the warning."""
    inside = story.warning is not None and story.warning.step in settings.primed
    return (story.warning.step + 1 - settings.primed.start) * 10 if inside and story.warning is not None else None


def suffering(runs: list[dict[str, Any]]) -> dict[int, int | None]:
    """By seed, the environment step from which a primed run's return stays below those of all healthy runs."""
    healthy = [r["returns"] for r in runs if r["kind"] == "healthy"]
    steps = KINDS["primed"].steps
    return {r["seed"]: onset(r["returns"], healthy, steps, MARGIN) for r in runs if r["kind"] == "primed"}


def main() -> None:
    """Trains what is missing and writes after every run."""
    digest = rules_digest()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    runs: list[dict[str, Any]] = stored.get("runs", []) if stored.get("rules") == digest else []
    runs = [r for r in runs if r["kind"] in KINDS]
    plan = [(kind, seed) for kinds, seeds in PLAN for seed in seeds for kind in kinds]
    for i, (kind, seed) in enumerate(() if sys.argv[1:] == ["tables"] else plan, start=1):
        if not any((r["kind"], r["seed"]) == (kind, seed) for r in runs):
            runs.append(measure(kind, seed))
            found = {"machine": machine("gymnasium"), "rules": digest, "suffers_from": suffering(runs), "runs": runs}
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
        told = next(r for r in runs if (r["kind"], r["seed"]) == (kind, seed))
        short = {name: value for name, value in told.items() if name != "returns"}
        print(f"{i} of {len(plan)}: {short}", flush=True)
    DOCS.write_text(docs_with(DOCS.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
