"""Whether what a run is told while it trains is what its log is told afterwards."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.early_warning.alarms import Alarm, events, pack_digest
from benchmarks.early_warning.seen import config_of, look
from benchmarks.early_warning.zoo import Run
from benchmarks.machine import machine
from traindiag.alerts.alert import Alert
from traindiag.playback.replay import replay

RUNS = 10
AGREE = Path(__file__).parents[1] / "results" / "early_warning_agree.json"


def agree(plan: Sequence[Run], folder: Path) -> int:
    """Trains some runs with the default pack on, compares and writes; gives the number that differ.

    Each is compared with the replay of its own log, message by message. Beside it stands when the stored run would
    have been told first. That one was trained without rules, so none asked for a burst of samples, and a live run,
    which is looked at more often, may be told earlier.

    Args:
        plan: Where they are picked from.
        folder: Where stored runs are.
    """
    rows = []
    for run in some(plan):
        with tempfile.TemporaryDirectory() as part:
            told, replayed = live_and_replayed(run, Path(part))
        row = {
            "run": run.name,
            "messages": len(told),
            "same_in_replay": timeless(told) == timeless(replayed),
            "first_live": _first(events(told)),
            "first_stored": _first(look(folder / "logs" / run.name, config_of(run)).alarms),
        }
        print(row)
        rows.append(row)
    AGREE.write_text(json.dumps({**machine(), "rules": pack_digest(), "runs": rows}, indent=1) + "\n")
    return sum(not row["same_in_replay"] for row in rows)


def _first(alarms: Sequence[Alarm]) -> int | None:
    return min((a.told for a in alarms), default=None)


def some(plan: Sequence[Run]) -> list[Run]:
    """One of each kind, with the controls: the first of each, shortest runs first."""
    firsts: dict[str, Run] = {}
    for run in sorted(plan, key=lambda r: r.recipe.steps):
        if not run.cure:
            firsts.setdefault(run.kind, run)
    return list(firsts.values())[:RUNS]


def live_and_replayed(run: Run, folder: Path) -> tuple[Sequence[Alert], Sequence[Alert]]:
    """Messages of a run that is trained now, and those of its log."""
    from benchmarks.early_warning.train import log_of, train

    train(run, folder, rules=True)
    (found,) = replay(log_of(folder, run.name)).runs
    assert found.told is not None
    return found.told, found.alerts


def timeless(alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    """Alerts as they are written, without what the clock on the wall and the name of the job have in them."""
    number: dict[str, int] = {}
    own = {"run": "", "time": 0.0, "time_to_limit": None}
    return [{**a.to_dict(), **own, "id": number.setdefault(a.id, len(number))} for a in alerts]
