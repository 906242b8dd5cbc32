"""Frames become history, verdicts and alerts, the same ones on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from traindiag.alerts.alert import Alert
from traindiag.alerts.book import AlertBook, own_rules
from traindiag.record.frame import Frame
from traindiag.record.series import History
from traindiag.rules.rule import Rule
from traindiag.rules.rule_set import RuleSet

BATCH = 16
"""Frames judged, recorded and written at a time: right after a training step the caches are cold, and one by one they
cost far more."""


class Judge:
    """Records a frame and judges exactly the numbers that were recorded.

    Args:
        rules: Rules of the run.
        run_id: Identifier that alerts carry.
        strict: Whether a rule that raises stops the run.
        report: Told once, in words, of a rule that is switched off.
        impatient: Whether some monitor has to know of each step at once, whatever the rules can wait for.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        run_id: str,
        *,
        strict: bool,
        report: Callable[[str], None],
        impatient: bool = False,
    ) -> None:
        self.history = History()
        """Every number recorded so far; :meth:`record` brings it up to date."""
        self._impatient = impatient
        self._unrecorded: list[Frame] = []
        self._rules = RuleSet(
            rules,
            strict=strict,
            on_fault=lambda name, error: report(
                f"rule {name!r} is switched off: {type(error).__name__}: {error}; training goes on"
            ),
        )
        self._book = AlertBook(run_id, own=own_rules(rules))

    @property
    def alerts(self) -> list[Alert]:
        """Everything told in this run, its earlier segments included, oldest first."""
        return self._book.alerts

    @property
    def patient(self) -> bool:
        """Whether a calm step may be heard up to ``BATCH`` steps late."""
        return self._rules.patient and not self._impatient

    def hear(self, frame: Frame) -> list[Alert]:
        """What there is to tell about ``frame``."""
        self._unrecorded.append(frame)
        if len(self._unrecorded) >= BATCH:
            self.record()
        return self._book.update(frame, self._rules.update(frame))

    def record(self) -> None:
        """Records every frame heard so far."""
        frames, self._unrecorded = self._unrecorded, []
        self.history.append(*frames)

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._book.run_id, "rules": self._rules.state_dict(), "alerts": self._book.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._book.run_id = str(state["run_id"])
        self._rules.load_state_dict(state["rules"])
        self._book.load_state_dict(state["alerts"])
