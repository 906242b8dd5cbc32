"""What happened in a run, in words and measured numbers: when it was told, when the loss showed it, what was lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from traindiag.alerts.alert import Alert
from traindiag.demo.band import Band, smooth
from traindiag.demo.run import Outcome


@dataclass(frozen=True, slots=True)
class Story:
    """The facts of one run.

    Args:
        outcome: The run.
        warnings: Alerts at WARNING or above when they were raised, oldest first.
        band: Healthy runs to compare with, None where none were measured for this model and length.
    """

    outcome: Outcome
    warnings: tuple[Alert, ...]
    band: Band | None

    @classmethod
    def of(cls, outcome: Outcome, alerts: Sequence[Alert], band: Band) -> Story:
        """Puts a run beside ``band`` where the two are comparable.

        Learning rate, seed, query/key norm and z-loss may differ: the question is what they did to the loss.
        """
        s = outcome.settings
        same = (s.layers, s.width, s.batch, s.context, s.steps) == (
            band.layers, band.width, band.batch, band.context, band.steps
        )  # fmt: skip
        warnings = tuple(a for a in alerts if a.severity != "info" and a.status != "closed")
        return cls(outcome, warnings, band if same else None)

    @property
    def warning(self) -> Alert | None:
        """The first warning about attention."""
        return next((a for a in self.warnings if a.family == "attention"), None)

    @property
    def onset(self) -> int | None:
        """Step at which the smoothed loss left the band of healthy runs for good."""
        return self.band.onset(self.outcome.losses) if self.band else None

    @property
    def lead(self) -> int | None:
        """Steps from the warning to the onset; negative where the warning came too late."""
        return None if self.warning is None or self.onset is None else self.onset - self.warning.step

    @property
    def fate(self) -> str:
        """``diverged``, ``damaged``, ``healthy``, or ``finished`` where there is nothing to compare with.

        Diverged: no number, or a loss above the one it began with. Damaged: it ended outside the band.
        """
        last = smooth(self.outcome.losses, window=11)[-1]
        if not math.isfinite(last) or last > self.outcome.losses[0]:
            return "diverged"
        if self.band is None:
            return "finished"
        return "damaged" if self.onset is not None else "healthy"

    def lines(self) -> list[tuple[str, str]]:
        """The story as pairs of a label and a sentence."""
        return [("warned", self._warned()), *self._loss(), ("at the end", self._end())]

    def _warned(self) -> str:
        if not self.warnings:
            return f"never: nothing at WARNING or above in {len(self.outcome.losses)} steps"
        if self.warning is None:
            return f"{_told(self.warnings[0])}; nothing about attention"
        return _told(self.warning)

    def _loss(self) -> list[tuple[str, str]]:
        if self.band is None:
            s = self.outcome.settings
            shape = f"{s.layers} layers of width {s.width} over {s.steps} steps"
            return [("loss", f"no healthy runs were measured for {shape}, so neither onset nor lead can be told")]
        runs = f"the band of {len(self.band.seeds)} healthy runs"
        if self.onset is None:
            return [("loss", f"ended inside {runs}")]
        told = [("loss", f"left {runs} for good at step {self.onset} (smoothed over {self.band.window} steps)")]
        if self.lead is None:
            return told
        late = "" if self.lead > 0 else ": the warning came too late"
        return [*told, ("lead", f"{self.lead} steps{late}")]

    def _end(self) -> str:
        validation = self.outcome.validation
        told = f"validation loss {validation:.2f} nats per byte"
        if self.band is None:
            return f"{self.fate}: {told}"
        low, high = min(self.band.validation), max(self.band.validation)
        told += f"; healthy runs reached {low:.2f} to {high:.2f}"
        if self.fate == "healthy":
            return f"healthy: {told}"
        worse = validation - sum(self.band.validation) / len(self.band.validation)
        word = "damaged, not diverged" if self.fate == "damaged" else "diverged"
        return f"{word}: {told}, so it is {worse:.2f} worse than their mean"


def _told(alert: Alert) -> str:
    limit = "" if alert.limit is None else f", limit {alert.limit:,.6g}"
    return f"at step {alert.step}: {alert.signal} at {alert.where} is {alert.value:,.4g}{limit} ({alert.kind})"
