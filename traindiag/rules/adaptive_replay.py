"""When to raise the replay ratio: low while the critic's plasticity is at risk, high once it has come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from traindiag.record.series import History
from traindiag.rules import arguments

_FAU = "plasticity/fau_pooled"


class AdaptiveReplayRatio:
    """The replay ratio (updates of the critic per environment step) of Ma et al. 2024, with a test of the level.

    Training begins with ``low``. At the end of every ``interval`` environment steps the mean fraction of active units
    (FAU) of the critic is held against that of the interval before. Once the change is below ``tau``, the critic is
    taken to have recovered and the ratio is ``high`` for good (arXiv 2310.07418 section 6).

    A dead critic does not change either, so the mean must also have kept ``healthy`` of the first FAU, which the
    published algorithm does not ask for. ``healthy=0`` is the published algorithm.

    The FAU is that of the batch of each update, as in the paper, handed to :meth:`update`; or that on fixed states as
    ``CriticPlasticity`` measures it, read by :meth:`follow`. The FAU of one batch of 256 varies by 0.002 (measured):
    a ``tau`` of 0.001 means something for means over 30 batches or more, or for fixed states.

    Args:
        low: Replay ratio at first. 0.5, as in the paper.
        high: Replay ratio after the switch. 2, as in the paper.
        interval: Environment steps from one test to the next. The paper has 50,000 (DeepMind Control) and 2,000
            (Atari-100k).
        tau: Change of the mean FAU that counts as none. 0.001, as in the paper.
        window: Environment steps at the end of an interval that the mean is taken over; None: all of it. The authors'
            code takes the last episode of fifty.
        healthy: Share of the first FAU that the mean must have kept. Ours; 0.8 is what other rules on plasticity
            call healthy.
        min_values: Values that a mean needs; a window with fewer decides nothing, and nor does the one after it.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> replay = AdaptiveReplayRatio(interval=10)
        >>> for step, fau in enumerate([0.5] + [0.45] * 9 + [0.44] * 10 + [0.44] * 11):
        ...     updates = replay.updates()  # what to do in this environment step
        ...     ratio = replay.update(fau, env_step=step)
        >>> replay.ratio, replay.switched_at
        (2.0, 30)
    """

    def __init__(
        self,
        low: float = 0.5,
        high: float = 2.0,
        *,
        interval: int = 50_000,
        tau: float = 0.001,
        window: int | None = None,
        healthy: float = 0.8,
        min_values: int = 1,
    ) -> None:
        arguments.above(0.0, low=low, high=high, tau=tau)
        if high < low:
            raise ValueError(f"high must be at least low, got high {high!r} and low {low!r}")
        arguments.at_least(1, interval=interval, window=window, min_values=min_values)
        if window is not None and window > interval:
            raise ValueError(f"window must not be longer than interval, got {window!r} and {interval!r}")
        arguments.share(healthy=healthy)
        self.low, self.high = float(low), float(high)
        self.interval, self.tau, self.healthy, self.min_values = interval, tau, healthy, min_values
        self.window = interval if window is None else window
        self._switched_at: int | None = None
        self._env_step = 0
        self._first: float | None = None
        self._before: float | None = None
        self._sum, self._count = 0.0, 0
        self._mean: float | None = None
        self._change: float | None = None
        self._end = interval
        self._owed = Fraction(0)
        self._read = -1

    @property
    def ratio(self) -> float:
        """Updates per environment step now."""
        return self.low if self._switched_at is None else self.high

    @property
    def switched_at(self) -> int | None:
        """Environment step of the switch; None before it."""
        return self._switched_at

    @property
    def change(self) -> float | None:
        """Change of the mean FAU at the last test; None before there was one."""
        return self._change

    @property
    def level(self) -> float | None:
        """Mean FAU at the last test as a share of the first; None before there was one."""
        return None if self._mean is None or not self._first else self._mean / self._first

    def update(self, fau: float, env_step: int) -> float:
        """Takes a fraction of active units that was measured at an environment step, and returns the ratio.

        Any number of values may come in one environment step, and steps may come without any.

        Raises:
            ValueError: If ``fau`` is no fraction, or ``env_step`` is smaller than before.
        """
        fau = float(fau)
        if not 0 <= fau <= 1:
            raise ValueError(f"fau must be between 0 and 1, got {fau!r}")
        env_step = self._time(env_step)
        if env_step >= self._end:
            self._test()
            if env_step >= self._end + self.interval:
                self._before = None  # the interval that has just gone by was not seen
            self._end = (env_step // self.interval + 1) * self.interval
        self._env_step = env_step
        if self._first is None:
            self._first = self._before = fau
        if env_step >= self._end - self.window:
            self._sum += fau
            self._count += 1
        return self.ratio

    def follow(self, history: History, env_step: int, module: str | None = None) -> float:
        """Takes what ``CriticPlasticity`` has measured since the last call, and returns the ratio.

        Cheap, but it waits for verdicts that are due: call it once in a hundred steps or so, not at each.

        Args:
            history: ``diagnostics.history``.
            env_step: Environment steps so far. New values count as measured now.
            module: Name of the critic where several modules are watched.

        Raises:
            ValueError: If ``module`` is not watched, or is missing where several are.
        """
        self._time(env_step)
        if _FAU not in history:
            return self.ratio
        series = history[_FAU]
        modules = [str(place[0]) for place in series.cells.coordinates]
        if module is None and len(modules) > 1:
            raise ValueError(f"module must be one of {', '.join(modules)}: several are watched")
        if module is not None and module not in modules:
            raise ValueError(f"module must be one of {', '.join(modules)}, got {module!r}")
        column = modules.index(module) if module is not None else 0
        new = np.flatnonzero(series.steps > self._read)
        for i in new:
            value = float(series.values[i, column])
            if math.isfinite(value):
                self.update(value, env_step)
        if len(new):
            self._read = int(series.steps[new[-1]])
        return self.ratio

    def updates(self, env_steps: int = 1) -> int:
        """Whole updates to do for ``env_steps`` environment steps; what is left over is owed to later ones.

        Fractions add up exactly: at a ratio of 0.1, ten steps give one update and nothing is left.

        Raises:
            ValueError: If ``env_steps`` is no integer of at least 0.

        Example:
            >>> replay = AdaptiveReplayRatio(low=0.5)
            >>> [replay.updates() for _ in range(4)]
            [0, 1, 0, 1]
        """
        arguments.at_least(0, env_steps=env_steps)
        self._owed += Fraction(repr(self.ratio)) * env_steps
        whole = math.floor(self._owed)
        self._owed -= whole
        return whole

    def _time(self, env_step: int) -> int:
        if isinstance(env_step, bool) or env_step != int(env_step) or env_step < self._env_step:
            raise ValueError(f"env_step must be an integer of at least {self._env_step}, got {env_step!r}")
        return int(env_step)

    def _test(self) -> None:
        """At the end of an interval."""
        mean = self._sum / self._count if self._count >= self.min_values else None
        self._sum, self._count = 0.0, 0
        before, self._before = self._before, mean
        if mean is None or before is None or self._first is None:
            return
        self._mean, self._change = mean, mean - before
        flat = abs(self._change) < self.tau
        if self._switched_at is None and flat and mean >= self.healthy * self._first:
            self._switched_at = self._end

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "switched_at": self._switched_at,
            "env_step": self._env_step,
            "first": self._first,
            "before": self._before,
            "sum": self._sum,
            "count": self._count,
            "mean": self._mean,
            "change": self._change,
            "end": self._end,
            "owed": [self._owed.numerator, self._owed.denominator],
            "read": self._read,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of a controller with the same arguments."""
        self._switched_at, self._env_step = state["switched_at"], int(state["env_step"])
        self._first, self._before = state["first"], state["before"]
        self._sum, self._count = float(state["sum"]), int(state["count"])
        self._mean, self._change, self._end = state["mean"], state["change"], int(state["end"])
        self._owed, self._read = Fraction(*state["owed"]), int(state["read"])
