"""NaN and infinity: a verdict of its own, judged before all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import BY_NAME
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.rule import Rule, Severity, Verdict

_FIRST = ("gradient/parameter_norm", "gradient/norm", "gradient/norm_applied", "loss/value")
"""Where to point when several signals are not finite: a parameter says more than the loss."""


class NonFinite(Rule):
    """Speaks while any reading holds NaN or infinity. It has no baseline that a bad value could enter.

    Losses, gradients and built-in signals are critical, numbers of the user's own a warning. Under ``16-mixed``
    precision the loss scaler skips a few steps with overflowing gradients by design: as long as the loss is finite
    that is info, for up to ``scaler_patience`` steps in a row.

    Args:
        scaler_patience: Steps in a row that a loss scaler may skip.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If ``scaler_patience`` is negative.

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> reading = Reading.scalar(BY_NAME["loss/value"], float("nan"))
        >>> NonFinite().update(Frame(7, "slow", {"loss/value": reading}, RunInfo()))[0].evidence
        'loss/value is nan'
    """

    signals: tuple[str, ...] = ()  # none in particular: it reads every signal
    patient = True

    def __init__(self, *, scaler_patience: int = 20, name: str = "nonfinite") -> None:
        arguments.at_least(0, scaler_patience=scaler_patience)
        self.scaler_patience, self.name = scaler_patience, name
        self._bad: list[str] = []
        self._streak = 0
        self._last_slow: int | None = None

    def update(self, frame: Frame) -> Sequence[Verdict]:
        if frame.lane == "slow":
            self._last_slow = frame.step
        bad = {}
        for name, reading in frame.readings.items():
            finite = np.isfinite(reading.values)
            if not finite.all() and (at := np.flatnonzero(reading.seen & ~finite)).size:
                bad[name] = at
        if not frame.readings.keys().isdisjoint(_FIRST):
            self._streak = self._streak + 1 if bad else 0
        was = bool(self._bad)
        if not bad and not was:
            return ()
        self._bad = sorted((set(self._bad) - frame.readings.keys()) | bad.keys())
        if bad:
            return (self._verdict(frame, bad),)
        if was and not self._bad:
            healthy = "every reading is finite again"
            return (Verdict(self.name, "nonfinite", "", frame.step, active=False, evidence=healthy),)
        return ()

    def _verdict(self, frame: Frame, bad: Mapping[str, np.ndarray[Any, Any]]) -> Verdict:
        signal = next((name for name in _FIRST if name in bad), next(iter(bad)))
        reading, at = frame.readings[signal], bad[signal]
        value = float(reading.values[at[0]])
        severity: Severity = "critical"
        if all(name not in BY_NAME and name.split("/")[0] not in ("loss", "gradient") for name in bad):
            severity = "warning"
        scaled = frame.run.precision == "16-mixed" and all(name.startswith("gradient/") for name in bad)
        if scaled and self._streak <= self.scaler_patience:
            severity = "info"
        names = (signal, *sorted(bad.keys() - {signal}))
        said = [self._said(name, frame.readings[name], bad[name]) for name in names]
        if severity == "info":
            said.append("the loss scaler of 16-mixed precision skips such steps")
        if frame.lane == "fast" and self._last_slow != frame.step:
            last = "none so far" if self._last_slow is None else f"the last is from step {self._last_slow}"
            said.append(f"attention and activations were not looked at in this step ({last})")
        rank = None if reading.ranks is None or reading.ranks[at[0]] < 0 else int(reading.ranks[at[0]])
        return Verdict(
            self.name,
            "nonfinite",
            signal,
            frame.step,
            True,
            severity,
            reading.cells[int(at[0])],
            value,
            None,
            int(at.size) - 1,
            rank=rank,
            evidence="; ".join(said),
        )

    @staticmethod
    def _said(name: str, reading: Reading, at: np.ndarray[Any, Any]) -> str:
        text = f"{name} is {float(reading.values[at[0]]):f}"
        if name == "gradient/parameter_norm":
            first, last = (reading.cells.coordinates[int(i)][-1] for i in (at[0], at[-1]))
            text += f" at {first}, first in forward order"
            if first != last:
                # Gradients flow from the output to the input: what is bad at some place makes all before it bad.
                text += f" of {at.size} of {int(reading.seen.sum())} parameters, {last} the last"
        elif reading.cells.axes and at.size < int(reading.seen.sum()):
            text += f" in {at.size} of {int(reading.seen.sum())} cells"
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"bad": list(self._bad), "streak": self._streak, "last_slow": self._last_slow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bad, self._streak, self._last_slow = list(state["bad"]), int(state["streak"]), state["last_slow"]
