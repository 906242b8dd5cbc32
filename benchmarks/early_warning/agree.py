"""Whether what a run is told while it trains is what its log is told afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.early_warning.alarms import events
from benchmarks.early_warning.seen import config_of, look
from benchmarks.early_warning.zoo import Run
from traindiag.alerts.alert import Alert
from traindiag.playback.replay import replay

RUNS = 10


def agree(plan: Sequence[Run], folder: Path) -> int:
    """Trains some runs with the default pack on and compares; gives the number that differ.

    Each is compared twice: with the replay of its own log, message by message, and, where the zoo holds it, with the
    alarms of the stored run, which was trained without rules.

    Args:
        plan: Where they are picked from.
        folder: Where stored runs are.
    """
    differ = 0
    for run in some(plan):
        with tempfile.TemporaryDirectory() as part:
            told, replayed = live_and_replayed(run, Path(part))
        same = told == replayed
        line = f"{run.name}: {len(told)} messages live, {'the same' if same else 'others'} in replay"
        stored = folder / "logs" / run.name
        if stored.exists():
            alike = look(stored, config_of(run)).alarms == events(told)
            line += f"; alarms of the stored run are {'the same' if alike else 'others'}"
            same &= alike
        print(line)
        differ += not same
    print(f"{differ} of them differ")
    return differ


def some(plan: Sequence[Run]) -> list[Run]:
    """One of each kind, with the controls: the first of each, shortest runs first."""
    firsts: dict[str, Run] = {}
    for run in sorted(plan, key=lambda r: r.recipe.steps):
        if not run.cure:
            firsts.setdefault(run.kind, run)
    return list(firsts.values())[:RUNS]


def live_and_replayed(run: Run, folder: Path) -> tuple[list[Alert], list[Alert]]:
    """Messages of a run that is trained now, and those of its log; the time of day is left out."""
    from benchmarks.early_warning.train import log_of, train

    train(run, folder, rules=True)
    (found,) = replay(log_of(folder, run.name)).runs
    assert found.told is not None
    return timeless(found.told), timeless(found.alerts)


def timeless(alerts: Sequence[Alert]) -> list[Alert]:
    """Alerts as written and read, without what the clock on the wall and the name of the job have in them."""
    number: dict[str, int] = {}
    return [
        replace(
            Alert.from_dict(a.to_dict()),
            id=str(number.setdefault(a.id, len(number))),
            run="",
            time=0.0,
            time_to_limit=None,
        )
        for a in alerts
    ]
