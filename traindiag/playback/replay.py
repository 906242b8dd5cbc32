"""A whole log judged once more, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from traindiag.alerts.alert import Alert
from traindiag.playback.foreign import ForeignRun, Unreadable, has_event_files, read_foreign
from traindiag.playback.judged import Judged, judge
from traindiag.playback.names import Name, name_signals
from traindiag.playback.series import Column, frames_of
from traindiag.record.recording import Recording, read_recordings
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History
from traindiag.rules.rule import Rule


@dataclass(frozen=True)
class ReplayedRun:
    """One run, judged once more.

    Args:
        source: Where its log was found.
        run: What was trained, as far as the log tells.
        alerts: Every message, oldest first.
        told: What the run itself told, where the log is ours.
        unjudged: Rules that could not be judged, with the signals that they wait for.
        rules: Names of all rules.
        steps: Steps of which the log has a reading.
        last: The last of them, -1 where there is none.
        history: Every signal.
        names: What each name of somebody else's log was taken for.
        notes: What could not be read, or has to be known of the numbers, in words.
    """

    source: str
    run: RunInfo
    alerts: tuple[Alert, ...]
    told: tuple[Alert, ...] | None
    unjudged: Mapping[str, tuple[str, ...]]
    rules: tuple[str, ...]
    steps: int
    last: int
    history: History
    names: tuple[Name, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replay:
    """Every run of a log, judged once more.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "metrics.csv"
        ...     _ = file.write_text("step,train_loss" + chr(10) + "0,2.5" + chr(10) + "1,nan")
        ...     found = replay(file)
        >>> [(a.step, a.title) for a in found.alerts]
        [(1, 'The loss is NaN')]
        >>> found.unjudged["gradient/norm-spike"]
        ('gradient/norm', 'gradient/norm_applied')
    """

    runs: tuple[ReplayedRun, ...]

    @property
    def alerts(self) -> list[Alert]:
        """Every message, run by run."""
        return [alert for run in self.runs for alert in run.alerts]

    @property
    def unjudged(self) -> dict[str, tuple[str, ...]]:
        """Rules that could be judged in no run, with the signals that they wait for."""
        first, *others = (run.unjudged for run in self.runs)
        return {name: signals for name, signals in first.items() if all(name in other for other in others)}


def replay(
    logdir: str | os.PathLike[str],
    rules: Sequence[Rule] | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> Replay:
    """Judges every run of a log as if it were trained now.

    A log of ours is judged exactly as its run was: same frames in the same order, so that the same rules tell the
    same alerts. Other logs are taken by the names of their numbers.

    Args:
        logdir: An event file, a CSV or JSONL file with a column of steps, a ``trainer_state.json``, or a folder that
            is searched with everything below it.
        rules: In place of the default pack; they are copied for each run.
        names: Our signal, or ``learning_rate``, for names of somebody else's log.

    Raises:
        traindiag.playback.foreign.Unreadable: If there is no log that can be read; a ``ValueError``.
        ValueError: If a name or signal in ``names`` does not exist, with near ones.
    """
    path = Path(logdir)
    if not path.exists():
        raise Unreadable(f"there is no log at {path}")
    recordings = read_recordings(path) if has_event_files(path) else []
    if recordings and names:
        raise ValueError(f"{path} is a log of traindiag's own, whose names are known; leave out the mapping")
    if recordings:
        return Replay(tuple(_recorded(recording, rules) for recording in recordings))
    foreign = read_foreign(path)
    known = list(dict.fromkeys(name for run in foreign for name in run.columns))
    name_signals(known, names)  # a name that no run has is a slip; one that some lack is not
    return Replay(tuple(_foreign(run, path, rules, names or {}) for run in foreign))


def _recorded(recording: Recording, rules: Sequence[Rule] | None) -> ReplayedRun:
    judged = judge(recording.frames(), rules, recording.segments[0].run)
    notes = list(recording.problems)
    spacing = recording.spacing
    for name, count in recording.lost.items():
        if name in spacing:
            notes.append(
                f"{name} has so many cells that the log holds one step in {spacing[name]} of it only: rules on it "
                "may tell something else than they told the run"
            )
        else:
            notes.append(f"{count} readings of {name} are lost")
    told = []
    for data in recording.alerts:
        try:
            told.append(Alert.from_dict(data))
        except (ValueError, TypeError, KeyError) as error:
            notes.append(f"an alert of the run could not be read: {error}")
    source = str(recording.segments[-1].file.parent)
    return _run(source, recording.run, judged, notes, told=tuple(told))


def _foreign(foreign: ForeignRun, root: Path, rules: Sequence[Rule] | None, given: Mapping[str, str]) -> ReplayedRun:
    names = name_signals(foreign.columns, {n: s for n, s in given.items() if n in foreign.columns})
    own = foreign.source.name if foreign.source == root else foreign.source.relative_to(root).as_posix()
    run = replace(foreign.run, run_id=own)
    columns = [Column.of(n.signal, foreign.columns[n.foreign]) for n in names]
    judged = judge(frames_of(columns, run), rules, run.run_id)
    return _run(str(foreign.source), run, judged, foreign.notes, names=tuple(names))


def _run(
    source: str,
    run: RunInfo,
    judged: Judged,
    notes: Sequence[str],
    *,
    told: tuple[Alert, ...] | None = None,
    names: tuple[Name, ...] = (),
) -> ReplayedRun:
    return ReplayedRun(
        source=source,
        run=run,
        alerts=tuple(judged.alerts),
        told=told,
        unjudged=judged.unjudged,
        rules=judged.rules,
        steps=judged.steps,
        last=judged.last,
        history=judged.history,
        names=names,
        notes=(*notes, *judged.notes),
    )
