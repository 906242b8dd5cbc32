"""Whether a run may pass: one exit code and one sentence."""

from __future__ import annotations

from traindiag.alerts.text import one_line
from traindiag.playback.replay import Replay, ReplayedRun
from traindiag.rules.rule import SEVERITIES, Severity

HEALTHY, ALERTS, UNREADABLE, NOT_ENOUGH = 0, 1, 3, 4
"""Exit codes; 2 is a wrong command line."""

MIN_STEPS = 31
"""Steps from which on every rule of the default pack can speak: spikes are held against the spread of 16 values, and
a forecast takes four samples, which are ten steps apart by default."""


def check(replayed: Replay, fail_on: Severity = "warning", min_steps: int = MIN_STEPS) -> tuple[int, str]:
    """The exit code and the reason.

    Alerts come first: a run that failed within three steps has failed, however little was seen of it.

    Args:
        replayed: What was judged.
        fail_on: Least severity that fails.
        min_steps: Steps below which silence proves nothing.

    Example:
        >>> from pathlib import Path
        >>> import tempfile
        >>> from traindiag.playback.replay import replay
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "metrics.jsonl"
        ...     _ = file.write_text('{"step": 0, "grad_norm": 1.0}')
        ...     check(replay(file))
        (4, 'not enough evidence: 1 step was judged, at least 31 are needed')
    """
    least = SEVERITIES.index(fail_on)
    worst = {a.id: a for a in replayed.alerts if a.status != "closed" and SEVERITIES.index(a.severity) >= least}
    if worst:
        first = min(worst.values(), key=lambda a: (-SEVERITIES.index(a.severity), a.step))
        count = len(worst)
        number = f"{count} alerts" if count > 1 else "1 alert"
        of = (
            ""
            if len(replayed.runs) == 1
            else f" in {len({a.run for a in worst.values()})} of {len(replayed.runs)} runs"
        )
        told = ", the worst: " if count > 1 else ": "
        return ALERTS, f"{number} of severity {fail_on} or above{of}{told}{one_line(first)}"
    for run in replayed.runs:
        lacking = _lacking(run, min_steps)
        if lacking:
            of = "" if len(replayed.runs) == 1 else f" of {run.source}"
            return NOT_ENOUGH, f"not enough evidence{of}: {lacking}"
    steps = sum(run.steps for run in replayed.runs)
    of = "" if len(replayed.runs) == 1 else f" of {len(replayed.runs)} runs"
    judged = max(len(run.rules) - len(run.unjudged) for run in replayed.runs)
    return HEALTHY, f"healthy: {judged} rules found nothing of severity {fail_on} or above in {steps:,} steps{of}"


def _lacking(run: ReplayedRun, min_steps: int) -> str:
    """Why silence proves nothing, or nothing."""
    if run.steps < min_steps:
        many = f"{run.steps} step was" if run.steps == 1 else f"{run.steps} steps were"
        return f"{many} judged, at least {min_steps} are needed"
    waiting = sorted({signal for signals in run.unjudged.values() for signal in signals})
    judged = [name for name in run.rules if name not in run.unjudged]
    if run.unjudged and len(judged) <= 1:  # NonFinite asks for no signal in particular
        return (
            f"of {len(run.rules)} rules only {len(judged)} could be judged; the others wait for {', '.join(waiting)}"
        )
    return ""
