"""What the continual demo tells, and how often shifts are found where there is none, over seeds of their own.

Thresholds and the demo's settings were chosen on seeds 0 to 4 and from 100 on. A run has 1,500 steps without a
shift, the switch, and 520 steps after it; without rehearsal English should be forgotten, with half of each batch it
should come back. Shifts that are found before the switch are false ones; digits, trained for long and never changed,
add streams of another kind. Runs that are in the result file under the same rules are kept, so an interrupted
benchmark goes on where it stopped.

    python -m benchmarks.demo_continual       # writes benchmarks/results/demo_continual.json, docs/stability_gap.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.tables import between
from traindiag import Diagnostics, StabilityGap, TrainingDiagnostics
from traindiag.demo.continual import TASK, Phases, stability_gap, train
from traindiag.demo.continual_story import Story
from traindiag.record import continual, loss_jump
from traindiag.record.loss_jump import LossJump
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.stability import TaskGap

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo_continual.json"
DOCS = ROOT / "docs" / "stability_gap.md"
SEEDS = (5, 6, 7, 8, 9)
REPLAYS = (0.5, 0.0)
DIGIT_SEEDS = (0, 1, 2, 3, 4)
DIGIT_STEPS = 2000


def judged_by() -> dict[str, Any]:
    """Digest of the rule, and every number that a verdict rests on."""
    numbers = {
        f"{module.__name__.rpartition('.')[2]}.{name}": value if isinstance(value, (int, float)) else list(value)
        for module in (continual, loss_jump)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, (int, float, tuple))
    }
    return {"rule": RuleSet([TaskGap()]).digest(), **numbers}


def measure(replay: float, seed: int) -> dict[str, Any]:
    """One run of the demo, watched by the monitor alone: the others change nothing and cost time."""
    phases = Phases(replay, seed=seed)
    monitor = stability_gap(phases)
    diagnostics = TrainingDiagnostics(
        monitors=[monitor], default_monitors=False, max_overhead=None, terminal=False, strict=True
    )
    outcome = train(phases, [diagnostics])
    story = Story.of(outcome, diagnostics.alerts, diagnostics.history, monitor.continual.gaps.get(TASK))
    gap, warning = story.gap, story.warning
    assert gap is not None
    shifts = diagnostics.history["stability/shift"]
    switch = phases.english
    jumps = loss_alone(outcome.losses)
    return {
        "replay": replay,
        "seed": seed,
        "found": [[int(step), labels(shifts, row)] for row, step in enumerate(shifts.steps)],
        "false_before_switch": sum(int(step) < switch for step in shifts.steps),
        "loss_alone": {
            "false_before_switch": sum(step < switch for step in jumps),
            "steps_late": next((step - switch for step in jumps if step >= switch), None),
        },
        "alerts_before_switch": len(story.before_the_switch),
        "warned_after_evaluations": story.evaluations,
        "warned_at_step": None if warning is None else warning.step - switch,
        "called": story.call,
        "severity": max((a.severity for a in story.alerts), key=("info", "warning", "critical").index, default=""),
        "baseline": round(gap.baseline, 4),
        "noise": round(gap.noise, 5),
        "depth": round(gap.depth, 4),
        "relative_depth": round(gap.relative_depth, 4),
        "trough": gap.trough,
        "recovery": gap.recovery,
        "residual": round(gap.residual, 4),
        "recovered": round(gap.recovered or 0.0, 3),
        "verdict": gap.final,
        "closed": any(a.status == "closed" for a in story.alerts),
    }


def labels(shifts: Any, row: int) -> list[str]:
    return [shifts.cells.label(int(i)) for i in np.flatnonzero(shifts.seen[row])]


def loss_alone(losses: tuple[float, ...]) -> list[int]:
    """Steps at which the loss by itself gives a shift away."""
    jump = LossJump()
    return [step for step, loss in enumerate(losses) if jump.push(loss)]


def digits(seed: int) -> dict[str, Any]:
    """A network that learns digits, and nothing else happens."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32).flatten(1)
    targets = torch.tensor(found.target)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    held_out, training = order[:500], order[500:]
    model = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityGap({"digits": [(images[held_out], targets[held_out])]}, accuracy, higher_is_better=True)
    diagnostics = Diagnostics(
        model, optimizer, monitors=[monitor], default_monitors=False, terminal=False, strict=True
    )
    for _ in range(DIGIT_STEPS):
        batch = training[torch.randint(len(training), (128,), generator=generator)]
        with diagnostics.step() as step:
            step.loss(nn.functional.cross_entropy(model(images[batch]), targets[batch])).backward()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    history = diagnostics.history
    false = len(history["stability/shift"].steps) if "stability/shift" in history else 0
    return {"seed": seed, "steps": DIGIT_STEPS, "false": false, "alerts": len(diagnostics.alerts)}


def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    images, targets = batch
    return (model(images).argmax(1) == targets).sum(), len(targets)


def false_detections(found: dict[str, Any]) -> tuple[int, int]:
    """False shifts and steps without one: the first phase of each seed once, and all digits."""
    english = [r for r in found["runs"] if r["replay"] == REPLAYS[0]]
    false = sum(r["false_before_switch"] for r in english) + sum(r["false"] for r in found["digits"])
    steps = len(english) * Phases(0.0).english + sum(r["steps"] for r in found["digits"])
    return false, steps


def runs_table(found: dict[str, Any]) -> str:
    """One row a run."""
    lines = [
        "| English kept | seed | warned at evaluation | called | deepest | back after | left at the end | verdict |",
        "|---" * 8 + "|",
    ]
    for r in found["runs"]:
        cells = (
            f"{r['replay']:.0%}".replace("%", " %"),
            str(r["seed"]),
            "never" if r["warned_after_evaluations"] is None else str(r["warned_after_evaluations"]),
            r["called"],
            f"{r['depth']:.3f} nats ({r['relative_depth']:.0%})".replace("%", " %"),
            "never" if r["recovery"] is None else f"{r['recovery']} steps",
            f"{r['residual']:+.3f} nats",
            r["verdict"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shifts_table(found: dict[str, Any]) -> str:
    """How shifts were found, and how many were none."""
    false, steps = false_detections(found)
    english = [r for r in found["runs"] if r["replay"] == REPLAYS[0]]
    alone = sum(r["loss_alone"]["false_before_switch"] for r in english)
    english_steps = len(english) * Phases(0.0).english
    alerts = sum(r["alerts_before_switch"] for r in english) + sum(r["alerts"] for r in found["digits"])
    lines = [
        "| | |",
        "|---|---|",
        f"| steps without a shift | {steps:,} ({english_steps:,} of English, the rest of digits) |",
        f"| false shifts in them | {false}, which is {1e4 * false / steps:.1f} in 10,000 steps |",
        f"| of these by the loss alone, in English | {alone} |",
        f"| alerts in them | {alerts} |",
    ]
    for replay in REPLAYS:
        late = [r["loss_alone"]["steps_late"] for r in found["runs"] if r["replay"] == replay]
        said = ", ".join("never" if n is None else str(n) for n in late)
        kept = f"{replay:.0%}".replace("%", " %")
        lines.append(f"| steps until the loss alone gives the switch away, {kept} of English kept | {said} |")
    return "\n".join(lines)


def with_tables(text: str, found: dict[str, Any]) -> str:
    """The page with its tables brought up to date."""
    m = found["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("python", "torch", "lightning"))
    note = f"Measured on {m['date']}, {m['machine']}, {versions}."
    text = between(text, "runs", runs_table(found) + "\n\n" + note)
    return between(text, "shifts", shifts_table(found))


def main() -> None:
    """Runs what is missing, writes after every run, and the tables at the end."""
    judged = judged_by()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept = stored if stored.get("judged_by") == judged else {}
    found: dict[str, Any] = {"machine": machine(), "judged_by": judged}
    found |= {part: kept.get(part, []) for part in ("runs", "digits")}
    plans: list[tuple[str, Callable[..., dict[str, Any]], list[tuple[Any, ...]], tuple[str, ...]]] = [
        ("digits", digits, [(s,) for s in DIGIT_SEEDS], ("seed",)),
        ("runs", measure, [(r, s) for s in SEEDS for r in REPLAYS], ("replay", "seed")),
    ]
    for part, run, plan, keys in plans:
        done = {tuple(r[k] for k in keys) for r in found[part]}
        for at in plan:
            if at not in done:
                found[part].append(run(*at))
                RESULT.parent.mkdir(exist_ok=True)
                RESULT.write_text(json.dumps(found, indent=1) + "\n")
                print(found[part][-1], flush=True)
    found["runs"].sort(key=lambda r: (-r["replay"], r["seed"]))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    DOCS.write_text(with_tables(DOCS.read_text(), found))


if __name__ == "__main__":
    main()
