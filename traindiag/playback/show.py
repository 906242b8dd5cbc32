"""A replay as its user sees it: on the terminal, or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from traindiag.alerts.alert import Alert
from traindiag.panels.terminal import TerminalPanel
from traindiag.playback.names import Name
from traindiag.playback.replay import Replay, ReplayedRun

SCHEMA_VERSION = 1
_SHOWN_NAMES = 12


def show(replayed: Replay, panel: TerminalPanel) -> None:
    """Prints every run: what it is, what it was told, how it ended, what could not be judged."""
    for run in replayed.runs:
        panel.facts(_facts(run))
        # a note a line at the end of each event would bury the rest
        panel.alerts(a for a in run.alerts if a.severity != "info" or a.status == "opened")
        panel.blank()
        panel.summary(run.history, run.alerts, run.steps)
        if run.unjudged:
            panel.facts([("not judged", _unjudged(run))])


def to_json(replayed: Replay) -> str:
    """The same for programs, under a versioned schema; non-finite numbers are strings, as in ``alerts.jsonl``."""
    runs = [
        {
            "source": run.source,
            "run": run.run.run_id,
            "model": run.run.model,
            "steps": run.steps,
            "last_step": None if run.last < 0 else run.last,
            "alerts": [a.to_dict() for a in run.alerts],
            "told": None if run.told is None else [a.to_dict() for a in run.told],
            "rules": list(run.rules),
            "unjudged": {name: list(signals) for name, signals in run.unjudged.items()},
            "names": {n.foreign: n.signal for n in run.names},
            "notes": list(run.notes),
        }
        for run in replayed.runs
    ]
    return json.dumps({"schema": SCHEMA_VERSION, "runs": runs}, indent=2, allow_nan=False, ensure_ascii=False)


def _facts(run: ReplayedRun) -> list[tuple[str, str]]:
    what = f" ({run.run.model})" if run.run.model else ""
    steps = f"{run.steps:,} step{'s' * (run.steps != 1)}" + (f", the last is {run.last:,}" if run.last >= 0 else "")
    rows = [("traindiag", f"replays {run.source}{what}: {steps}; {len(run.rules)} rules")]
    rows += [("note", text) for text in run.notes]
    rows += [("names", text) for text in _names(run.names)]
    if run.told is not None:
        rows.append(("then", _compared(run.told, run.alerts)))
    return rows


def _names(names: Sequence[Name]) -> list[str]:
    known = [f"{n.foreign} is {n.signal} ({n.why})" for n in names if n.why in ("given", "guessed")]
    rest = [n.signal if n.why == "unknown" else n.foreign for n in names if n.why not in ("given", "guessed")]
    more = f" and {len(rest) - _SHOWN_NAMES} more" if len(rest) > _SHOWN_NAMES else ""
    others = [f"as they are: {', '.join(rest[:_SHOWN_NAMES])}{more}"] if rest else []
    hint = ["a wrong guess is put right with --map NAME=SIGNAL"] if any(n.why == "guessed" for n in names) else []
    return known + others + hint


def _compared(told: Sequence[Alert], now: Sequence[Alert]) -> str:
    """What the run itself told, against what is told now."""

    def keys(alerts: Sequence[Alert]) -> Counter[tuple[Any, ...]]:
        return Counter((a.rule, a.step, a.status, a.severity) for a in alerts)

    many = f"{len(told)} message{'s' * (len(told) != 1)}"
    gone, new = keys(told) - keys(now), keys(now) - keys(told)
    if not gone and not new:
        return f"the run itself told the same {many}" if told else "the run itself told nothing either"
    parts = [f"the run itself told {many}"]
    for counted, words in ((gone, "not told now"), (new, "told now only")):
        if counted:
            rules = sorted({key[0] for key in counted})
            parts.append(f"{counted.total()} {words} ({', '.join(rules)})")
    return "; ".join(parts)


def _unjudged(run: ReplayedRun) -> str:
    signals = dict.fromkeys(signal for wanted in run.unjudged.values() for signal in wanted)
    rules = f"{len(run.unjudged)} of {len(run.rules)} rules" if len(run.unjudged) > 1 else next(iter(run.unjudged))
    return f"{rules}: the log has no {', '.join(signals)}"
