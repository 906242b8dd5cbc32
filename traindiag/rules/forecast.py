"""When a growing signal will cross its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import check_signal
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.cell_table import CellTable
from traindiag.rules.line_fit import Floats, Lines, fit_lines
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import in_steps, more, number, steps

FLOOR = 30
"""Least window and least horizon in steps: a young run has few steps behind it, and fails within as few."""

WINDOW = 2000
"""Greatest window in steps, so that late growth is not buried under a long quiet past. A forecast looks at most two
windows ahead: measured false alarms hold for that ratio, and a slow drift carried on for longer reaches any limit."""

SPACING = 32
"""Samples are kept a 32nd of the window apart: a burst of samples in a row must not outweigh the rest."""

ROWS = 48
"""Room for the samples of one window; 32 at a fixed window, 44 while it grows with the run."""

FIT = 0.8
"""Least share of the variance of the logarithm that the line must explain."""


class Forecast(Rule):
    """Speaks when a growing signal is on its way across a limit.

    It fits two lines through the logarithm of the recent values: over steps (growth goes on exponentially) and over
    the logarithm of steps (it goes on as a power of time, which is what attention logits mostly do). It speaks where
    *both* reach the limit within the horizon, *each newer half of the window alone* does so too (a curve that bends
    off below the limit does not), and the line that fits better explains at least 80 % of the variance. That line
    gives the expected step; the 80 % intervals of both give the range. The window is half of the steps run so far,
    but at least 30 and at most 2000 steps.

    A cell that was foretold stays so while it is beyond the limit, and until ``persistence`` samples in a row
    foretell nothing. NaN, infinity and values not above zero have no logarithm: they neither enter the fit nor count
    as samples.

    Args:
        signal: Name of a signal with positive values.
        limit: What it must not reach, above zero.
        horizon: Steps to look ahead; by default as many as the run has done, at least 30 and at most 4000, and no
            more than are left.
        min_samples: Samples of a cell before it is judged.
        persistence: Consecutive samples that must foretell the crossing.
        cooldown: Steps of rest that end the event.
        where: Glob over a cell's label or any one of its coordinates.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique; made of signal and limit where it is not given.

    Raises:
        ValueError: If an argument is out of its range or the signal does not exist.

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Forecast("reward/kl", limit=1000.0)
        >>> for step in range(0, 70, 10):  # doubles every 10 steps: 8, 16, ... 512
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), 8.0 * 2 ** (step / 10))
        ...     verdicts = rule.update(Frame(step, "slow", {"reward/kl": reading}, RunInfo()))
        >>> round(verdicts[0].steps_to_limit[1], 1)
        9.7
    """

    def __init__(
        self,
        signal: str,
        *,
        limit: float,
        horizon: int | None = None,
        min_samples: int = 3,
        persistence: int = 2,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "warning",
        name: str | None = None,
    ) -> None:
        check_signal(signal)
        arguments.above(0.0, limit=limit)
        arguments.at_least(1, horizon=horizon, persistence=persistence)
        arguments.at_least(3, min_samples=min_samples)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.signal, self.signals = signal, (signal,)
        self.limit, self.horizon = limit, horizon
        self.min_samples, self.persistence, self.cooldown = min_samples, persistence, cooldown
        self.where, self.severity = where, severity
        self.name = name or f"{signal} reaches {number(limit)}" + ("" if where == "*" else f" at {where}")
        self._table = CellTable(where, logs=(ROWS, np.nan), foretold=0, quiet=0, active=False)
        self._steps = np.full(ROWS, -1)  # step of each row of ``logs``; -1: free
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        reading = frame.readings.get(self.signal)
        if reading is None:
            return ()
        table, step = self._table, frame.step
        values, seen = table.align(reading)
        judged = seen & np.isfinite(values) & (values > 0)
        if not judged.any():
            return ()
        log = np.full(values.shape, np.nan)
        np.log(values, out=log, where=judged)
        window = min(max(step // 2, FLOOR), WINDOW)
        self._steps[(self._steps >= step) | (self._steps < step - window)] = -1
        past = np.flatnonzero(self._steps >= 0)
        past = past[np.argsort(self._steps[past])]
        taken = np.append(self._steps[past], step).astype(np.float64)
        logs = np.vstack([table["logs"][past], log])
        if step - self._steps.max(initial=-WINDOW) >= window / SPACING or not past.size:
            row = int(np.argmin(self._steps))  # a free one, otherwise the oldest
            self._steps[row], table["logs"][row] = step, log
        horizon = self._horizon(frame)
        crossing, lines = self._crossing(taken, logs, step, horizon)
        self._remember(crossing, judged, values)
        return self._tell(frame, reading, values, judged, crossing, lines, horizon, taken)

    def _horizon(self, frame: Frame) -> int:
        if self.horizon is not None:
            return self.horizon
        done = min(max(frame.step, FLOOR), 2 * WINDOW)
        return done if frame.run.length is None else min(done, max(frame.run.length - frame.step, 0))

    def _crossing(self, taken: Floats, logs: Floats, step: int, horizon: int) -> tuple[Floats, Lines]:
        """Steps to the limit, ``[3, n]`` as low, mid, high; NaN where nothing is foretold."""
        level = float(np.log(self.limit))
        half = len(taken) // 2
        now = logs[-1]
        nothing = np.full((3, logs.shape[1]), np.nan)
        if len(taken) < self.min_samples:
            return nothing, fit_lines(taken - step, logs)
        axes = (taken - step, np.log((taken + 1) / (step + 1)))
        ahead = (float(horizon), float(np.log1p(horizon / (step + 1))))
        lines = [fit_lines(x, logs) for x in axes]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            told = (now < level) & (lines[0].points >= self.min_samples)
            for x, reach, whole in zip(axes, ahead, lines):
                newer = fit_lines(x[half:], logs[half:])
                told &= now + np.minimum(whole.slope, newer.slope) * reach >= level
            by_steps = lines[0].fit >= lines[1].fit
            told &= np.maximum(lines[0].fit, lines[1].fit) >= FIT
            exponential = np.stack(lines[0].crossing(level))
            power = (step + 1) * np.expm1(np.stack(lines[1].crossing(level)))
            mid = np.where(by_steps, exponential[1], power[1])
            spans = np.stack([np.minimum(exponential[0], power[0]), mid, np.maximum(exponential[2], power[2])])
        best = Lines(*(np.where(by_steps, a, b) for a, b in zip(*lines)))
        return np.where(told, np.maximum(spans, 0.0), nothing), best

    def _remember(self, crossing: Floats, judged: BoolArray, values: FloatArray) -> None:
        table = self._table
        told = judged & ~np.isnan(crossing[1])
        beyond = judged & (values >= self.limit)
        table["foretold"] = np.where(judged, np.where(told, table["foretold"] + 1, 0), table["foretold"])
        table["quiet"] = np.where(judged, np.where(told | beyond, 0, table["quiet"] + 1), table["quiet"])
        table["active"] &= table["quiet"] < self.persistence
        table["active"] |= table["foretold"] >= self.persistence

    def _tell(
        self,
        frame: Frame,
        reading: Reading,
        values: FloatArray,
        judged: BoolArray,
        crossing: Floats,
        lines: Lines,
        horizon: int,
        taken: Floats,
    ) -> Sequence[Verdict]:
        table = self._table
        assert table.cells is not None
        active = table["active"]
        if not self._open and (judged & (values >= self.limit)).any():
            return ()  # some cell is there already: what is left to say is not a forecast
        if not active.any():
            if not self._open:
                return ()
            self._open = False
            at, spoken = int(np.argmax(np.where(judged, values, -np.inf))), None
            evidence = f"{self.signal} is no longer on its way to {number(self.limit)}"
        else:
            self._open = True
            told = np.flatnonzero(active & judged)
            if not told.size:
                return ()
            # The cell that is there first; those already beyond count as there.
            left = np.where(values[told] >= self.limit, -1.0, np.nan_to_num(crossing[1, told], nan=np.inf))
            at = int(told[np.argmin(left)])
            there = bool(values[at] >= self.limit)
            low, mid, high = (0.0, 0.0, 0.0) if there else (float(c) for c in crossing[:, at])
            spoken = None if np.isnan(mid) else (low, mid, high)
            evidence = self._evidence(frame, float(values[at]), spoken, lines, at, horizon, taken)
            evidence += more(int(told.size) - 1)
        return (
            Verdict(
                self.name,
                "forecast",
                self.signal,
                frame.step,
                bool(active.any()),
                self.severity,
                table.cells[at],
                float(values[at]),
                self.limit,
                max(int((active & judged).sum()) - 1, 0),
                spoken,
                table.rank(reading, at),
                evidence,
                self.cooldown,
            ),
        )

    def _evidence(
        self,
        frame: Frame,
        value: float,
        left: tuple[float, float, float] | None,
        lines: Lines,
        at: int,
        horizon: int,
        taken: Floats,
    ) -> str:
        text = f"{self.signal} is {number(value)}"
        if left is None:
            return f"{text}; its way to {number(self.limit)} is no longer clear"
        if left[1] == 0.0 and value >= self.limit:
            return f"{text} and has reached {number(self.limit)}, as foretold"
        low, high = steps(left[0]), steps(left[2])
        text += (
            f" and grows: it reaches {number(self.limit)} in about {in_steps(left[1])} ({low} to {high}), by "
            f"{lines.points[at]} samples of the last {int(frame.step - taken[0])} steps (R2 {lines.fit[at]:.2f})"
        )
        if self.horizon is None and frame.run.length is None:
            text += f"; the run's length is unknown, so it looks ahead by the steps run so far, here {horizon}"
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open, "steps": self._steps.tolist(), "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open = bool(state["open"])
        self._table.load_state_dict(state["table"])
        rows = np.array(state["steps"])
        # A window of another length is lost with its values (CellTable): no row of it may count.
        self._steps = rows if rows.shape == self._steps.shape else np.full(ROWS, -1)
