"""What diagnosing costs, measured by itself."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median


class Meter:
    """Host time spent in diagnostics, inside ``with meter:``, against the time of a step.

    What a sampled step costs more is spread over the steps between samples. On an accelerator host time misses
    kernels that run later.
    """

    def __init__(self) -> None:
        self.own_seconds = 0.0
        self.wall_seconds = 0.0
        self.steps = 0
        self._own_in_step = 0.0
        self._depth = 0
        self._entered = 0.0
        self._last: float | None = None
        self._pace: float | None = None
        self._walls: dict[bool, deque[float]] = {False: deque(maxlen=64), True: deque(maxlen=16)}
        self._owns: dict[bool, deque[float]] = {False: deque(maxlen=64), True: deque(maxlen=16)}

    def __enter__(self) -> None:
        if self._depth == 0:
            self._entered = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._own_in_step += time.perf_counter() - self._entered

    def step_done(self, *, sampled: bool) -> None:
        """Closes one step."""
        now = time.perf_counter()
        own, self._own_in_step = self._own_in_step, 0.0
        if self._last is not None:
            wall = now - self._last
            self._walls[sampled].append(wall)
            self._owns[sampled].append(own)
            self.own_seconds += own
            self.wall_seconds += wall
            self.steps += 1
            if self._pace is None or self.steps % 16 == 0:  # a median every step would be felt
                self._pace = median(self._walls[False] or self._walls[True])
        self._last = now

    def pause(self) -> None:
        """Leaves out what happens until the next step, such as validation."""
        self._last = None

    @property
    def seconds_per_step(self) -> float | None:
        """Median of recent steps, brought up to date now and then."""
        return self._pace

    @property
    def total_share(self) -> float:
        """Diagnostics as a share of the time of all steps; NaN before the second one."""
        return self.own_seconds / self.wall_seconds if self.wall_seconds else math.nan

    def recent_shares(self, cadence: int) -> tuple[float, float]:
        """Recent cost of what is done every step, and of what samples add, as shares of the time of a step without.

        NaN until three steps of either kind are known.
        """
        idle, sampled = self._owns[False], self._owns[True]
        if len(idle) < 3 or len(sampled) < 3:
            return math.nan, math.nan
        every_step = median(idle)
        base = median(self._walls[False]) - every_step
        if base <= 0:
            return math.nan, math.nan
        return every_step / base, max(0.0, median(sampled) - every_step) / (cadence * base)

    def forget_samples(self) -> None:
        """The cadence has changed: new samples speak for the new one."""
        self._owns[True].clear()
