"""Continual evaluation: what repeated looks at fixed held-out samples tell of tasks learned before.

All of it is plain arithmetic over ``(step, value)``, for metrics where higher is better and for losses alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Verdict = Literal["none", "open", "transient", "partial", "forgetting"]
Likely = Literal["transient", "forgetting"]

WINDOWS = (10, 100)
"""Evaluations that windowed forgetting and plasticity look across: arXiv 2205.13452."""

BASELINE, BASELINE_STEPS, BASELINE_LEAST = 20, 200, 3
"""Evaluations before a shift that make its baseline, how far back they may lie, and how many are taken whatever that
is: while a metric still improves, old ones are no level."""

OPENS = 0.02
OPENS_SIGMAS = 3.0
OPENS_IN_A_ROW = 2
"""A gap opens where two evaluations in a row are worse than the baseline by both."""

RECOVERS, RECOVERS_IN_A_ROW = 0.1, 3
RECOVERS_POINTS = 0.01
"""It has closed where three in a row leave a tenth of its depth, three sigma or, for accuracies, a point at most."""

RESIDUAL = 20
"""Evaluations whose mean gap is the residual."""

HORIZON = 500
"""Steps after a shift at which what has not come back counts as forgotten."""

TRANSIENT, PARTIAL = 0.95, 0.5
"""Shares of the depth that have come back at the horizon, for either verdict."""

CALLED = 5
"""Evaluations after a shift from which on it is said what a gap is likely to become."""

EARLY_DEPTH, DEPTH, EARLY = 0.11, 0.175, 8
"""The gap before the 8th evaluation, and the depth from there on, that is likely forgetting; parts of the baseline.
Tuning runs were a byte-level Transformer from English to Python, and digits that are rotated: rehearsal and joint
training fell by 3 to 9 % at the 5th evaluation and 4 to 15 % in all, training on new data alone by 8 to 45 % and 13
to 54 %."""

COMES_BACK = 0.4
"""Part of the depth at which a gap is on its way back, however deep it was: losses near zero rise manifold."""

COURSE_EVERY = 10
"""Steps between the points that this is taken from."""

SETTLED = 100
"""Steps from which on the course of the gap is carried on to the horizon instead."""

BETWEEN = 0.25, 0.6
"""Parts of the depth that are left there: below it is likely transient, above forgetting, and between the last call
holds."""

SLOPE = 5
"""Evaluations that the slope of the fall is taken over."""

LOSS_FLOOR = 1e-3
"""Least noise of a metric that is no share, as a part of its level."""


class Swings:
    """Windowed forgetting and plasticity of one task, evaluation by evaluation (arXiv 2205.13452, section 4).

    Args:
        higher_is_better: Direction of the metric.
        windows: Lengths ``w``: two evaluations are compared where they are among ``w`` consecutive ones.

    Example:
        >>> swings = Swings(windows=(2, 3))
        >>> for value in (0.9, 0.7, 0.6, 0.8):
        ...     swings.push(value)
        >>> [round(x, 3) for x in (swings.fall[2], swings.fall[3], swings.rise[2])]
        [0.2, 0.3, 0.2]
    """

    def __init__(self, higher_is_better: bool = True, windows: Sequence[int] = WINDOWS) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        self.fall = dict.fromkeys(windows, 0.0)
        """Largest worsening so far within each window; 0 before there is any."""
        self.rise = dict.fromkeys(windows, 0.0)
        """Largest improvement."""
        self._recent: deque[float] = deque(maxlen=max(windows) - 1)

    def push(self, value: float) -> None:
        """Takes the next evaluation."""
        now = self._sign * value
        if self._recent:
            recent = np.array(self._recent)
            for window in self.fall:
                seen = recent[-(window - 1) :]
                self.fall[window] = max(self.fall[window], float(seen.max()) - now)
                self.rise[window] = max(self.rise[window], now - float(seen.min()))
        self._recent.append(now)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent), "fall": list(self.fall.values()), "rise": list(self.rise.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken, with the same windows."""
        self._recent.clear()
        self._recent.extend(state["recent"])
        self.fall, self.rise = dict(zip(self.fall, state["fall"])), dict(zip(self.rise, state["rise"]))


def baseline_of(steps: Sequence[int], values: Sequence[float], shift: int) -> float:
    """Level before a shift: the mean of the evaluations that are near it.

    Args:
        steps: Steps of the evaluations before the shift, rising.
        values: What they found.
        shift: First step of the shift.

    Example:
        >>> baseline_of([0, 100, 700, 800, 900], [9.0, 9.0, 1.0, 2.0, 3.0], 1000)
        2.0
    """
    near = [v for s, v in zip(steps[-BASELINE:], values[-BASELINE:]) if shift - s <= BASELINE_STEPS]
    return float(np.mean(near if len(near) >= BASELINE_LEAST else values[-BASELINE_LEAST:]))


def noise_of(values: Sequence[float], level: float, samples: float | None) -> float:
    """Standard deviation of an evaluation by chance, from successive differences.

    Args:
        values: Evaluations before a shift, in order.
        level: Their level.
        samples: Samples of an evaluation where the metric is a share between 0 and 1, None where it is not.

    Example:
        >>> noise_of([1.0, 2.0, 1.0, 2.0], 1.5, None) > 0.8, noise_of([0.5], 0.5, 100.0), noise_of([2.0], 2.0, None)
        (True, 0.05, 0.002)
    """
    differences = np.diff(np.asarray(values[-BASELINE:], np.float64))
    found = float(np.std(differences, ddof=1)) / math.sqrt(2) if len(differences) > 1 else 0.0
    floor = LOSS_FLOOR * abs(level) if samples is None else 0.5 / math.sqrt(max(samples, 1.0))
    return max(found, floor)


class Gap:
    """What one shift does to one task.

    Steps are counted from the shift. Gaps are positive where the metric is worse than its baseline.

    Args:
        shift: First step of the shift.
        baseline: Level before it.
        noise: Standard deviation of an evaluation by chance.
        higher_is_better: Direction of the metric.
        share: Whether the metric is a share between 0 and 1: limits are then points, and otherwise parts of the
            baseline.

    Example:
        >>> gap = Gap(100, baseline=0.9, noise=0.01, share=True)
        >>> for step, value in enumerate([0.8, 0.6, 0.7, 0.85, 0.89, 0.9, 0.9], start=100):
        ...     gap.push(step, value)
        >>> round(gap.depth, 3), gap.trough, gap.opened, gap.recovery, gap.verdict
        (0.3, 1, 1, 4, 'transient')
    """

    def __init__(
        self, shift: int, baseline: float, noise: float, *, higher_is_better: bool = True, share: bool = False
    ) -> None:
        self.shift, self.baseline, self.noise = shift, baseline, noise
        self.higher_is_better, self.share = higher_is_better, share
        self.scale = 1.0 if share else abs(baseline)
        """What shares of the baseline are taken of; points are taken as they are."""
        self.evaluations = 0
        self.depth = 0.0
        """Largest gap so far, at least 0."""
        self.trough: int | None = None
        """Steps after the shift at which it was deepest; None while it was never worse than the baseline."""
        self.opened: int | None = None
        """Steps after the shift at which the gap had opened; None if it has not."""
        self.recovery: int | None = None
        """Steps after the shift from which on it was closed again; None while it is not."""
        self.likely: Likely | None = None
        """What an open gap is likely to become; None before there are five evaluations, and where nothing is open."""
        self.area = 0.0
        """Sum of positive gaps, each times the steps since the evaluation before."""
        self.age = -1
        """Steps after the shift of the last evaluation."""
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=RESIDUAL)
        self._bad = self._good = 0
        self._good_since: int | None = None
        self._course: list[tuple[int, float]] = []

    @property
    def limit(self) -> float:
        """The gap that is one."""
        return max(OPENS_SIGMAS * self.noise, OPENS * self.scale)

    @property
    def relative_depth(self) -> float:
        """Depth as a part of the baseline; NaN for a baseline of 0."""
        return self.depth / abs(self.baseline) if self.baseline else math.nan

    @property
    def now(self) -> float:
        """The last gap; NaN before the first evaluation."""
        return self._recent[-1] if self._recent else math.nan

    @property
    def slope(self) -> float | None:
        """How much worse it became from one evaluation to the next, over the first five; None before a sixth."""
        return (self._first[SLOPE] - self._first[0]) / SLOPE if len(self._first) > SLOPE else None

    @property
    def residual(self) -> float:
        """Mean of the last 20 gaps; negative where the metric is better than before."""
        return float(np.mean(self._recent)) if self._recent else math.nan

    @property
    def recovered(self) -> float | None:
        """Share of the depth that has come back; None while no gap has opened."""
        return None if self.opened is None else 1.0 - self.residual / self.depth

    @property
    def verdict(self) -> Verdict:
        """What became of it: ``none`` while it has not opened, ``open`` until it has closed or is 500 steps old."""
        if self.opened is None or self.recovery is not None:
            return "none" if self.opened is None else "transient"
        return "open" if self.age < HORIZON else self.final

    @property
    def final(self) -> Verdict:
        """The verdict if nothing came after this."""
        if self.opened is None or self.recovery is not None:
            return "none" if self.opened is None else "transient"
        back = self.recovered
        assert back is not None
        return "transient" if back >= TRANSIENT else "partial" if back >= PARTIAL else "forgetting"

    def _call(self) -> Likely | None:
        """What an open gap is likely to become. The evidence is its course alone: early on how deep it is and whether
        it comes back, later on where it leads.
        """
        if self.opened is None or self.evaluations < CALLED:
            return None
        if self.recovery is not None:
            return "transient"
        if self.age >= SETTLED:
            left = (self._at_horizon() if self.age < HORIZON else self.residual) / self.depth
            if self.likely is not None and BETWEEN[0] <= left <= BETWEEN[1]:
                return self.likely
            return "forgetting" if left > PARTIAL else "transient"
        gap, limit = (self.now, EARLY_DEPTH) if self.evaluations < EARLY else (self.depth, DEPTH)
        deep = gap > limit * abs(self.baseline)
        last = float(np.mean(list(self._recent)[-3:]))
        return "forgetting" if deep and last > COMES_BACK * self.depth else "transient"

    def _at_horizon(self) -> float:
        """The gap at the horizon if it goes on as in the latter half of the time since the shift."""
        latter = [(age, gap) for age, gap in self._course if age >= self.age / 2]
        ages, gaps = np.array(latter, np.float64).T
        if ages[-1] == ages[0]:
            return float(gaps.mean())
        slope, level = np.polyfit(ages, gaps, 1)
        return float(level + slope * HORIZON)

    def push(self, step: int, value: float) -> None:
        """Takes the next evaluation; what is not finite is left out."""
        if math.isfinite(value):
            self._take(step, value)
            self.likely = self._call()

    def _take(self, step: int, value: float) -> None:
        gap = self.baseline - value if self.higher_is_better else value - self.baseline
        before, self.age = self.age, step - self.shift
        self.evaluations += 1
        if len(self._first) <= SLOPE:
            self._first.append(gap)
        self._recent.append(gap)
        if self.age <= HORIZON and (not self._course or self.age - self._course[-1][0] >= COURSE_EVERY):
            self._course.append((self.age, gap))
        self.area += max(gap, 0.0) * max(self.age - before, 1)
        if gap > self.depth:
            self.depth, self.trough = gap, self.age
            self._good, self.recovery = 0, None
        closed = max(RECOVERS * self.depth, OPENS_SIGMAS * self.noise, RECOVERS_POINTS if self.share else 0.0)
        opens = self.limit if self.recovery is None else max(self.limit, closed)
        self._bad = self._bad + 1 if gap > opens else 0
        if self.opened is None:
            if self._bad >= OPENS_IN_A_ROW:
                self.opened = self.age
            return
        if self.recovery is not None and self._bad >= OPENS_IN_A_ROW:  # it was not the end of it
            self.recovery, self._good = None, 0
        if gap > closed:
            self._good = 0
        else:
            if not self._good:
                self._good_since = self.age
            self._good += 1
            if self._good >= RECOVERS_IN_A_ROW and self.recovery is None:
                self.recovery = self._good_since

    _PLAIN = (
        "evaluations",
        "depth",
        "trough",
        "opened",
        "recovery",
        "likely",
        "area",
        "age",
        "_bad",
        "_good",
        "_good_since",
    )

    def state_dict(self) -> dict[str, Any]:
        """Plain data, the arguments included."""
        known = ("shift", "baseline", "noise", "higher_is_better", "share")
        course = [list(point) for point in self._course]
        lists = {"first": list(self._first), "recent": list(self._recent), "course": course}
        return {
            "arguments": {name: getattr(self, name) for name in known},
            "plain": {name: getattr(self, name) for name in self._PLAIN},
            **lists,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Gap:
        """The gap that :meth:`state_dict` was taken of."""
        gap = cls(**state["arguments"])
        for name in cls._PLAIN:
            setattr(gap, name, state["plain"][name])
        gap._first = list(state["first"])
        gap._course = [(int(age), float(value)) for age, value in state["course"]]
        gap._recent.extend(state["recent"])
        return gap


class Course:
    """One task's evaluations: what continual metrics need of them, in bounded memory.

    Args:
        higher_is_better: Direction of the metric.
    """

    def __init__(self, higher_is_better: bool = True) -> None:
        self._sign = 1.0 if higher_is_better else -1.0
        self.swings = Swings(higher_is_better)
        self.steps: deque[int] = deque(maxlen=BASELINE)
        self.values: deque[float] = deque(maxlen=BASELINE)
        self.share = higher_is_better
        """Whether all values so far lie between 0 and 1 and higher is better."""
        self.learned: float | None = None
        """Value when the task had just been learned; None while it has not."""
        self._best: float | None = None
        self._worst: float | None = None

    def push(self, step: int, value: float) -> None:
        """Takes the next evaluation; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self.share = self.share and 0.0 <= value <= 1.0
        self.swings.push(value)
        self.steps.append(step)
        self.values.append(value)
        if self.learned is not None and (self._worst is None or self._sign * value < self._sign * self._worst):
            self._worst = value

    def end(self, *, learned: bool) -> None:
        """A task ends here, this one if ``learned``: its minimum counts from now on."""
        if not self.values:
            return
        last = self.values[-1]
        if learned and self.learned is None:
            self.learned = self._best = last
        elif self._best is not None and self._sign * last > self._sign * self._best:
            self._best = last

    @property
    def worst(self) -> float | None:
        """Worst value since it was learned; None before there is one."""
        return self._worst

    @property
    def forgetting(self) -> float | None:
        """Best value at the end of any task since it was learned, less the present one; positive is worse."""
        if self._best is None or self._worst is None:
            return None
        return self._sign * (self._best - self.values[-1])

    @property
    def transfer(self) -> float | None:
        """The present value less the one when it had just been learned; negative is worse."""
        if self.learned is None or self._worst is None:
            return None
        return self._sign * (self.values[-1] - self.learned)

    _PLAIN = ("share", "learned", "_best", "_worst")

    def state_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self._PLAIN}
        series = {"steps": list(self.steps), "values": list(self.values), "swings": self.swings.state_dict()}
        return {**plain, **series}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.steps = deque(state["steps"], BASELINE)
        self.values = deque(state["values"], BASELINE)
        self.swings.load_state_dict(state["swings"])


class Continual:
    """All tasks of a run, evaluation by evaluation and shift by shift.

    A task is learned when training turns to another one: to one that is named, or to anything where the task that
    training is at is not known. A shift that names no task while that is known (a learning rate that rises within a
    task) ends nothing.

    Args:
        tasks: Names of the tasks that are evaluated.
        higher_is_better: Direction of the metric.
        current: The task that the run begins with, where it is one of them. None: all of them are old at the first
            shift, but for the one that it turns to.

    Example:
        >>> run = Continual(("a", "b"), current="a")
        >>> for step, (a, b) in enumerate([(0.9, 0.1), (0.9, 0.1), (0.3, 0.8), (0.7, 0.8)]):
        ...     if step == 2:
        ...         run.turn(step, "b")
        ...     run.evaluate(step, {"a": a, "b": b}, {"a": 100, "b": 100})
        >>> {name: round(value, 3) for name, value in run.summary().items() if name in ("min_acc", "wc_acc")}
        {'min_acc': 0.3, 'wc_acc': 0.55}
        >>> run.gaps["a"].trough, round(run.gaps["a"].depth, 3)
        (0, 0.6)
    """

    KEPT = 20
    """Shifts whose gaps are kept."""

    def __init__(self, tasks: Sequence[str], higher_is_better: bool = True, current: str | None = None) -> None:
        self.higher_is_better, self.current = higher_is_better, current
        self.courses = {task: Course(higher_is_better) for task in tasks}
        self.gaps: dict[str, Gap] = {}
        """Of the last shift, by task, where there had been an evaluation before it."""
        self.earlier: deque[dict[str, Gap]] = deque(maxlen=self.KEPT)
        """Of the shifts before it, oldest first, as they were when the next one came."""
        self.shift: int | None = None
        """First step of the last shift."""
        self._samples: dict[str, float] = {}

    def evaluate(self, step: int, values: Mapping[str, float], samples: Mapping[str, float]) -> None:
        """Takes one evaluation.

        Args:
            step: Step after whose update it was made.
            values: Metric by task.
            samples: What each is a mean over.
        """
        for task, value in values.items():
            self._samples[task] = samples[task]
            self.courses[task].push(step, value)
            if (gap := self.gaps.get(task)) is not None and step >= gap.shift:
                gap.push(step, value)

    def turn(self, step: int, task: str | None = None) -> None:
        """Training is another one from ``step`` on.

        Args:
            step: First step of it.
            task: The task that it turns to, where that is one of those evaluated.
        """
        if self.gaps:
            self.earlier.append(self.gaps)
        before, self.shift, self.gaps = self.current, step, {}
        if task is not None:
            self.current = task
        for name, course in self.courses.items():
            done = name != task if before is None else task is not None and task != before and name == before
            course.end(learned=done)
            old = course.learned is not None if name != task else False
            if not course.values or not (old or (task is None and name == before)):
                continue  # it is what training turns to, or still to come: nothing that could be forgotten
            steps, values = list(course.steps), list(course.values)
            level = baseline_of(steps, values, step)
            noise = noise_of(values, level, self._samples[name] if course.share else None)
            direction, share = self.higher_is_better, course.share
            self.gaps[name] = Gap(step, level, noise, higher_is_better=direction, share=share)

    def forget(self, task: str) -> None:
        """What was seen of a task is no measure for what comes."""
        self.courses[task] = Course(self.higher_is_better)
        self.gaps.pop(task, None)

    def summary(self) -> dict[str, float]:
        """Metrics of the whole run by name, those that are defined: before the first shift only windowed ones."""
        found: dict[str, float] = {}
        learned = [c for name, c in self.courses.items() if c.worst is not None and name != self.current]
        if learned:
            found["min_acc"] = float(np.mean([c.worst for c in learned if c.worst is not None]))
            found["forgetting"] = float(np.mean([c.forgetting for c in learned if c.forgetting is not None]))
            found["backward_transfer"] = float(np.mean([c.transfer for c in learned if c.transfer is not None]))
            now = self.courses.get(self.current or "")
            if now is not None and now.values:
                k = len(learned) + 1
                found["wc_acc"] = now.values[-1] / k + (1 - 1 / k) * found["min_acc"]
        looked = [c.swings for c in self.courses.values() if c.values]
        for window in WINDOWS if looked else ():
            found[f"wf_{window}"] = float(np.mean([s.fall[window] for s in looked]))
            found[f"wp_{window}"] = float(np.mean([s.rise[window] for s in looked]))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "current": self.current,
            "shift": self.shift,
            "samples": dict(self._samples),
            "courses": {name: course.state_dict() for name, course in self.courses.items()},
            "gaps": _states(self.gaps),
            "earlier": [_states(gaps) for gaps in self.earlier],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; tasks that are new begin anew."""
        self.current, self.shift = state["current"], state["shift"]
        self._samples = dict(state["samples"])
        for name, course in self.courses.items():
            if name in state["courses"]:
                course.load_state_dict(state["courses"][name])
        self.gaps = {n: Gap.from_state(g) for n, g in state["gaps"].items() if n in self.courses}
        self.earlier.clear()
        self.earlier.extend({n: Gap.from_state(g) for n, g in gaps.items()} for gaps in state["earlier"])


def _states(gaps: Mapping[str, Gap]) -> dict[str, Any]:
    return {name: gap.state_dict() for name, gap in gaps.items()}
