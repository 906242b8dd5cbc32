"""Old tasks that get worse when a run turns to other data, and whether they come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.cells import Cell, Coordinate
from traindiag.record.continual import HORIZON, Gap
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.rule import SEVERITIES, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

_METRICS = ("stability/value", "stability/loss")
_LEVELS = ("stability/baseline", "stability/noise")
_SHIFT = "stability/shift"
_DEPTH = "stability/gap_depth"

CHANGED = 5
"""Evaluations in a row after which a call that has turned for the worse is told."""


class TaskGap(Rule):
    """Speaks when an old task has fallen below its level from before a shift, and says what that is likely to become.

    A gap opens where two evaluations in a row are worse than that level by more than three standard deviations of an
    evaluation and by 2 %: points of a share, a part of the level for anything else. It is told at the fifth
    evaluation after the shift at the earliest, with a call: whether it is likely to pass or to stay. It is told again
    where it has become deep, where a call that it would pass has not held for five evaluations, and where it has not
    passed 500 steps after the shift. It ends when it has closed, or with the next shift. Without a shift nothing is
    ever told.

    Kinds of its verdicts: ``gap`` (likely to pass) and ``likely forgetting``; at the horizon ``partial`` (half of it
    has come back) and ``forgetting``.

    Args:
        points: Depth of a share (such as an accuracy) that is a warning, and one that is critical.
        rise: The same for any other metric, as parts of its level.
        cooldown: Steps of rest that end the event; a gap that has closed is over.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        De Lange, van de Ven, Tuytelaars, Continual evaluation for lifelong learning: identifying the stability gap,
        ICLR 2023, arXiv 2205.13452.

    Example:
        >>> from traindiag.record.catalogue import BY_NAME
        >>> from traindiag.record.cells import Cells
        >>> from traindiag.record.run_info import RunInfo
        >>> rule, tasks = TaskGap(), Cells.along("task", ["english"])
        >>> def at(step, **values):
        ...     readings = {f"stability/{n}": Reading(BY_NAME[f"stability/{n}"], tasks, np.float32([v]),
        ...                                           np.ones(1, np.bool_)) for n, v in values.items()}
        ...     return rule.update(Frame(step, "active", readings, RunInfo()))
        >>> turn = Reading(BY_NAME["stability/shift"], Cells.along("reason", ["python"]), np.float32([1]),
        ...                np.ones(1, np.bool_))
        >>> _ = rule.update(Frame(100, "fast", {"stability/shift": turn}, RunInfo()))
        >>> for step, loss in enumerate([1.5, 1.6, 1.7, 1.72, 1.74], start=100):
        ...     said = at(step, loss=loss, baseline=1.5, noise=0.002)
        >>> said[0].kind, said[0].severity
        ('likely forgetting', 'warning')
        >>> said[0].evidence.partition(": ")[2]
        '0.24 (16 %) worse than 1.5 before the shift at step 100 (python), the most so far; likely forgetting'
    """

    signals = (*_METRICS, *_LEVELS, _SHIFT)
    patient = True  # what it judges comes by messages that are never late

    def __init__(
        self,
        *,
        points: tuple[float, float] = (0.05, 0.20),
        rise: tuple[float, float] = (0.03, 0.20),
        cooldown: int = 0,
        name: str = "stability/gap",
    ) -> None:
        for what, pair in (("points", points), ("rise", rise)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{what} must be two positive depths, the smaller one first, got {pair!r}")
        arguments.at_least(0, cooldown=cooldown)
        self.points, self.rise, self.cooldown, self.name = tuple(points), tuple(rise), cooldown, name
        self._shift: tuple[int, str] | None = None
        self._gaps: dict[str, Gap] = {}
        self._shares: dict[str, bool] = {}
        self._calls: dict[str, _Call] = {}
        self._open: str | None = None

    def update(self, frame: Frame) -> Sequence[Verdict]:
        said: list[Verdict] = []
        turn = frame.readings.get(_SHIFT)
        if turn is not None and turn.seen.any():
            if self._open is not None:
                said.append(self._over(frame, "training has turned to something else again"))
            reasons = " and ".join(turn.cells.label(int(i)) for i in np.flatnonzero(turn.seen))
            self._shift = frame.step, reasons
            self._gaps, self._calls, self._open = {}, {}, None
        metric = next((frame.readings[n] for n in _METRICS if n in frame.readings), None)
        if metric is None:
            return said
        start = frame.readings.get("stability/start")
        for reading in (metric, start) if start is not None else (metric,):
            self._learn_shares(reading, metric.signal.name == _METRICS[0])
        if self._shift is not None:
            self._follow(frame, metric)
        return said or self._judge(frame, metric)

    def _learn_shares(self, reading: Reading, higher_is_better: bool) -> None:
        for i in np.flatnonzero(reading.seen & np.isfinite(reading.values)):
            task, value = _task(reading.cells.coordinates[i]), float(reading.values[i])
            self._shares[task] = self._shares.get(task, higher_is_better) and 0.0 <= value <= 1.0

    def _follow(self, frame: Frame, metric: Reading) -> None:
        levels, noises = (frame.readings.get(name) for name in _LEVELS)
        assert self._shift is not None
        if levels is None or noises is None:
            return
        for i in np.flatnonzero(metric.seen):
            at = metric.cells.coordinates[i]
            task, here = _task(at), levels.cells.position.get(at)
            if here is None or not levels.seen[here] or noises.cells.position.get(at) is None:
                continue
            if task not in self._gaps:
                level, noise = float(levels.values[here]), float(noises.values[noises.cells.position[at]])
                higher = metric.signal.name == _METRICS[0]
                share = self._shares.get(task, False)
                self._gaps[task] = Gap(self._shift[0], level, noise, higher_is_better=higher, share=share)
                self._calls[task] = _Call()
            gap = self._gaps[task]
            gap.push(frame.step, float(metric.values[i]))
            self._calls[task].hear(gap)

    def _judge(self, frame: Frame, metric: Reading) -> list[Verdict]:
        failing = {t: g for t, g in self._gaps.items() if g.opened is not None and g.likely and g.recovery is None}
        failing = {t: g for t, g in failing.items() if g.verdict != "transient"}
        if not failing:
            return [self._over(frame, "it has closed")] if self._open is not None else []
        severities = {task: self._severity(gap, self._calls[task]) for task, gap in failing.items()}
        task = max(failing, key=lambda t: (SEVERITIES.index(severities[t]), failing[t].depth / failing[t].limit))
        self._open = task
        gap = failing[task]
        return [
            Verdict(
                self.name,
                _kind(gap),
                _DEPTH,
                frame.step,
                True,
                severities[task],
                Cell(("task",), (task,)),
                gap.depth,
                gap.limit,
                len(failing) - 1,
                evidence=self._evidence(metric.signal.name, task, gap) + more(len(failing) - 1),
                cooldown=self.cooldown,
            )
        ]

    def _severity(self, gap: Gap, call: _Call) -> Severity:
        depth = gap.depth / gap.scale if gap.scale else np.inf
        warns, alarms = self.points if gap.share else self.rise
        level = 2 if depth >= alarms else 1 if depth >= warns else 0
        if call.turned or gap.verdict == "forgetting":
            level = min(level + 1, 2)
        return SEVERITIES[level]

    def _evidence(self, signal: str, task: str, gap: Gap) -> str:
        assert self._shift is not None
        step, reasons = self._shift
        now = gap.baseline - gap.now if gap.higher_is_better else gap.baseline + gap.now
        worst = "the most so far" if gap.trough == gap.age else f"{number(gap.depth)} {gap.trough} steps after it"
        verdicts = {
            "forgetting": f"not back after {HORIZON} steps: forgetting",
            "partial": f"{1 - gap.residual / gap.depth:.0%} of it back after {HORIZON} steps: partly forgotten",
        }
        call = verdicts.get(gap.verdict, "likely to pass" if gap.likely == "transient" else "likely forgetting")
        return (
            f"{signal} of {task} is {number(now)}: {_size(gap.now, gap)} worse than {number(gap.baseline)} before "
            f"the shift at step {step} ({reasons}), {worst}; {call}"
        )

    def _over(self, frame: Frame, evidence: str) -> Verdict:
        task, self._open = str(self._open), None
        cell, value = Cell(("task",), (task,)), self._gaps[task].depth
        return Verdict(
            self.name,
            "gap",
            _DEPTH,
            frame.step,
            False,
            "info",
            cell,
            value,
            evidence=evidence,
            cooldown=self.cooldown,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "shift": None if self._shift is None else list(self._shift),
            "gaps": {task: gap.state_dict() for task, gap in self._gaps.items()},
            "shares": dict(self._shares),
            "calls": {task: call.state_dict() for task, call in self._calls.items()},
            "open": self._open,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        shift = state["shift"]
        self._shift = None if shift is None else (int(shift[0]), str(shift[1]))
        self._gaps = {task: Gap.from_state(gap) for task, gap in state["gaps"].items()}
        self._shares = dict(state["shares"])
        self._calls = {task: _Call() for task in self._gaps}
        for task, call in self._calls.items():
            call.load_state_dict(state["calls"][task])
        self._open = state["open"]


class _Call:
    """Whether what was first called likely to pass is so no more."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.worse = 0
        self.turned = False

    def hear(self, gap: Gap) -> None:
        self.first = self.first or gap.likely
        self.worse = self.worse + 1 if self.first == "transient" and gap.likely == "forgetting" else 0
        self.turned = self.turned or self.worse >= CHANGED

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "worse": self.worse, "turned": self.turned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.worse, self.turned = state["first"], int(state["worse"]), bool(state["turned"])


def _kind(gap: Gap) -> str:
    if gap.verdict in ("partial", "forgetting"):
        return gap.verdict
    return "likely forgetting" if gap.likely == "forgetting" else "gap"


def _size(value: float, gap: Gap) -> str:
    if gap.share:
        return f"{100 * value:.3g} points"
    return f"{number(value)} ({value / gap.scale:.0%})".replace("%", " %") if gap.scale else number(value)


def _task(at: tuple[Coordinate, ...]) -> str:
    """Name of a task; a bare series has none."""
    return str(at[0]) if at else ""
