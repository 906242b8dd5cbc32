"""What is to be told of a stored run, read once: our alarms by replay, and what every rival's rule scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.early_warning.alarms import Alarm, events
from benchmarks.early_warning.rivals import RIVALS, Config, Scores
from benchmarks.early_warning.zoo import Run
from traindiag.playback.replay import replay
from traindiag.rules.rule import Rule


@dataclass(frozen=True)
class Seen:
    """One stored run.

    Args:
        alarms: Ours.
        scores: By name of the rival, for those whose signals the run has: a model without attention has no logits.
    """

    alarms: Sequence[Alarm]
    scores: Mapping[str, Scores] = field(default_factory=dict)


def look(log: Path, config: Config, rules: Sequence[Rule] | None = None) -> Seen:
    """Judges one stored run by the default pack, or by other rules, and by every rival."""
    (run,) = replay(log, rules).runs
    scores: dict[str, Scores] = {}
    for rival in RIVALS:
        if all(signal in run.history for signal in rival.signals):
            series = {s: (run.history[s].steps, run.history[s].worst().filled(float("nan"))) for s in rival.signals}
            scores[rival.name] = rival.scores(series, config)
    return Seen(events(run.alerts), scores)


def look_at_all(plan: Sequence[Run], folder: Path, jobs: int) -> dict[str, Seen]:
    """The same of many, by name."""
    logs = [folder / "logs" / run.name for run in plan]
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(look, logs, [config_of(run) for run in plan], chunksize=8)
        return dict(zip((run.name for run in plan), found))


def config_of(run: Run) -> Config:
    """What is known before the first step; ``lr_times`` only where the best learning rate has been looked for."""
    recipe = run.recipe
    return {
        "length": recipe.steps,
        "warmup": recipe.warmup,
        "peak_lr": recipe.lr * recipe.peak_times,
        "lr_times": recipe.peak_times,
        "eps": recipe.eps,
        "qk_norm": float(recipe.qk_norm),
        "norm": float(recipe.norm),
    }
