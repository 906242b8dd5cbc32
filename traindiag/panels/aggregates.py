"""The few numbers that stand for a frame in every logger: what stock dashboards show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from traindiag.record.frame import Frame, Reading
from traindiag.record.signal import Signal

MAX_TAGS = 60
"""A run that logs more signals of its own has the rest in the log only: dashboards fetch each tag by itself."""
FAST_EVERY = 50
"""Steps between points of the fast lane where no slow sample sets the pace."""

_MEDIAN = ("attention/max_logit", "attention/entropy")  # the worst head alone tells no outlier from a common drift
_FEW_CELLS = ((), ("optimizer",), ("site",))
_LOG_ONLY = ("gradient/block_norm", "gradient/parameter_norm", "optimizer/parameter_norm")
"""Of many norms that of the largest tensor wins."""
_FLAGS = "wiring"  # right or wrong: nothing that a curve would show
_THEIRS = "logged"  # numbers that the loop logs itself stand in its loggers already


class Aggregates:
    """Reduces frames to ``{tag: value}``, grouped by family as ``diag_<family>/<metric>``.

    Where a signal has many cells, ``_max`` or ``_min`` is its worst cell. Fast signals get a point at slow samples
    only: their value at that step and, as ``_max`` or ``_min``, the worst of all steps since the last point. Nothing
    is summed over optimizers: with several, each has its tag.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> kl = Signal("reward/kl", (), "kl")
        >>> Aggregates().update(Frame(0, "slow", {"reward/kl": Reading.scalar(kl, 0.5)}, RunInfo()))
        {'diag_reward/kl': 0.5}
    """

    def __init__(self) -> None:
        self._tags: set[str] = set()
        self._fast = _Interval()
        self._due = True
        self._point = -1

    def update(self, frame: Frame) -> dict[str, float]:
        """Takes a frame in and returns the points that are due at its step; often none for a fast one."""
        points: dict[str, float] = {}
        if frame.sampled:
            if self._fast.step == frame.step:  # its fast frame may come before it or after it
                points = self._close_interval()
            self._due = self._point != frame.step
            for reading in frame.readings.values():
                if _shown(reading.signal):
                    points |= _slow_points(reading)
        elif frame.lane == "active":
            for reading in frame.readings.values():
                points |= _slow_points(reading)
        elif frame.lane == "fast":
            self._fast.take(frame)
            if self._due or frame.step - self._point >= FAST_EVERY:
                points = self._close_interval()
        for name, rate in frame.learning_rates.items() if points else ():
            points["diag_optimizer/learning_rate" + (f"/{name}" if len(frame.learning_rates) > 1 else "")] = rate
        return self._admit(points)

    def flush(self) -> tuple[int, dict[str, float]]:
        """The step of the last fast frame and its points, if no point has shown them yet."""
        step = self._fast.step
        return max(step, 0), self._admit(self._close_interval())

    def _close_interval(self) -> dict[str, float]:
        points, self._point, self._due = self._fast.last | self._fast.worst, self._fast.step, False
        self._fast = _Interval()
        return points

    def _admit(self, points: dict[str, float]) -> dict[str, float]:
        for tag in points:
            if len(self._tags) < MAX_TAGS:
                self._tags.add(tag)
        return {tag: value for tag, value in points.items() if tag in self._tags}


@dataclass
class _Interval:
    """Fast readings since the last point."""

    step: int = -1
    last: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    def take(self, frame: Frame) -> None:
        self.step = frame.step
        for reading in frame.readings.values():
            signal = reading.signal
            if not _shown(signal):
                continue
            entries = _one_by_one(reading, f"_{signal.worst}")
            if entries is None:
                worst = _worst(reading)
                entries = {} if worst is None else {_collapsed(signal): worst}
            else:
                self.last |= _one_by_one(reading) or {}
            for tag, value in entries.items():
                self.worst[tag] = _worse(signal, self.worst.get(tag), value)


def _shown(signal: Signal) -> bool:
    return signal.name not in _LOG_ONLY and signal.family not in (_THEIRS, _FLAGS)


def _base(signal: Signal) -> str:
    return "diag_" + signal.name


def _collapsed(signal: Signal) -> str:
    says_so = signal.name.split("/")[-1].split("_")[0] == signal.worst
    return _base(signal) + ("" if says_so else f"_{signal.worst}")


def _slow_points(reading: Reading) -> dict[str, float]:
    alone = _one_by_one(reading)
    if alone is not None:
        return alone
    worst = _worst(reading)
    if worst is None:
        return {}
    points = {_collapsed(reading.signal): worst}
    if reading.signal.name in _MEDIAN:
        points[_base(reading.signal) + "_median"] = float(np.median(reading.values[reading.seen]))
    return points


def _one_by_one(reading: Reading, suffix: str = "") -> dict[str, float] | None:
    """A tag for each cell where there is one, or one an optimizer or loss; None where cells must be collapsed."""
    base, count = _base(reading.signal) + suffix, len(reading.cells)
    if reading.cells.axes not in _FEW_CELLS:
        return None
    tags = [base] if count == 1 else [f"{base}/{c[0]}" for c in reading.cells.coordinates]
    return {tag: float(v) for tag, v, seen in zip(tags, reading.values, reading.seen) if seen}


def _worst(reading: Reading) -> float | None:
    at = reading.worst()
    return None if at is None else float(reading.values[at])


def _worse(signal: Signal, a: float | None, b: float) -> float:
    if a is None or not math.isfinite(b):
        return b
    if not math.isfinite(a):
        return a
    return max(a, b) if signal.worst == "max" else min(a, b)
