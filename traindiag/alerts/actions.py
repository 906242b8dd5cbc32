"""What an alert does beside being shown: :class:`Call`, and what the engine does for one at the end of a step."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from traindiag.alerts.alert import Alert, Status
from traindiag.alerts.text import one_line
from traindiag.record.catalogue import near
from traindiag.record.signal import Clock
from traindiag.rules.rule import SEVERITIES, Severity

STATUSES: tuple[Status, ...] = ("opened", "escalated", "closed")
CLOCKS: tuple[Clock, ...] = ("fast", "slow")


class Selective:
    """Base of actions that are for some alerts only.

    A plain function of an alert is an action too, for all of them.

    Args:
        severity: It is for alerts of at least this severity.
        clock: For those that leave 1 to 8 steps (``fast``), hundreds (``slow``), or both (None).
        diagnosis: Glob over the name of the diagnosis or of the rule.
        status: For events that open, get worse, or are over.

    Raises:
        ValueError: With the value, what was expected, and what is near.
    """

    everywhere = True
    """Whether it is called on every rank."""

    def __init__(
        self,
        *,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        _one_of("severity", severity, SEVERITIES)
        if clock is not None:
            _one_of("clock", clock, CLOCKS)
        if not isinstance(diagnosis, str) or not diagnosis:
            raise ValueError(f"diagnosis must be a glob over names of diagnoses and rules, got {diagnosis!r}")
        if isinstance(status, str):
            raise ValueError(f"status must be a list of {', '.join(STATUSES)}, got the text {status!r}")
        if not status:
            raise ValueError("status must name at least one of opened, escalated, closed, got none")
        for each in status:
            _one_of("status", each, STATUSES)
        self.severity, self.clock, self.diagnosis, self.status = severity, clock, diagnosis, tuple(status)

    def wants(self, alert: Alert) -> bool:
        """Whether it is for ``alert``.

        Example:
            >>> alert = Alert("1f", "opened", "gradient/norm-spike", "run", 0, 7, 0.0, None, "warning", "fast",
            ...     "gradient", "gradient/norm", "", 30.0, 10.0, "spike")
            >>> [StopTraining(**k).wants(alert) for k in ({}, {"severity": "critical"}, {"diagnosis": "gradient/*"})]
            [True, False, True]
        """
        names = (getattr(alert, "diagnosis", "") or "", alert.rule)
        return (
            alert.status in self.status
            and SEVERITIES.index(alert.severity) >= SEVERITIES.index(self.severity)
            and self.clock in (None, alert.clock)
            and any(fnmatch.fnmatchcase(name, self.diagnosis) for name in names)
        )

    def settings(self) -> dict[str, Any]:
        """What tells it from another one of its kind; nothing secret."""
        usual = {"severity": "warning", "clock": None, "diagnosis": "*", "status": ("opened", "escalated")}
        return {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


class Call(Selective):
    """Calls a function with the alert, on every rank, when the step that brought it up has ended.

    Args:
        function: A function of an alert. One that raises is told once and not called again.
        severity: See :class:`Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Raises:
        TypeError: If it cannot be called.
        ValueError: For a wrong condition.

    Example:
        >>> Call(print, severity="critical", clock="fast")
        Call(print, severity='critical', clock='fast')
    """

    def __init__(
        self,
        function: Callable[[Alert], object],
        *,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        super().__init__(severity=severity, clock=clock, diagnosis=diagnosis, status=status)
        self.function = _function("Call needs", function)

    def __call__(self, alert: Alert) -> None:
        if self.wants(alert):
            self.function(alert)

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"Call({', '.join([name, *(f'{k}={v!r}' for k, v in self.settings().items())])})"


class Decision(Selective):
    """An action that all ranks must take at the same step: the engine does it, at the end of one."""


class StopTraining(Decision):
    """Ends training after the step, on all ranks after the same one, as a trainer's early stopping does.

    In a loop of your own, leave it when ``diagnostics.should_stop`` is true.

    Args:
        severity: See :class:`Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Example:
        >>> StopTraining(severity="warning", clock="slow")
        StopTraining(clock='slow')
    """


class SaveCheckpoint(Decision):
    """Saves a checkpoint at the end of the step, on all ranks: when an event opens, and once more if it gets worse.

    Lightning's lie in ``traindiag/checkpoints`` beside the log; Hugging Face's Trainer saves one of its own.

    Args:
        save: In a loop of your own: a function that saves, called with a name for the checkpoint, such as
            ``step-31-nonfinite-opened``. It is called on every rank.
        severity: See :class:`Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Raises:
        TypeError: If ``save`` cannot be called.
        ValueError: For a wrong condition, or for events that are over: an event has two checkpoints at most.

    Example:
        >>> SaveCheckpoint(diagnosis="attention/*")
        SaveCheckpoint(diagnosis='attention/*')
    """

    def __init__(
        self,
        save: Callable[[str], object] | None = None,
        *,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        super().__init__(severity=severity, clock=clock, diagnosis=diagnosis, status=status)
        if "closed" in self.status:
            raise ValueError("SaveCheckpoint: status must be of opened and escalated, got closed: it is over then")
        self.save = None if save is None else _function("SaveCheckpoint: save must be", save, "a checkpoint's name")


class Raise(Decision):
    """Raises :class:`TrainingAlert` at the end of the step, on all ranks, when everything is written.

    Args:
        severity: See :class:`Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Example:
        >>> Raise(severity="critical")
        Raise(severity='critical')
    """


class TrainingAlert(RuntimeError):
    """Training has been ended by :class:`Raise`.

    Args:
        alert: Why.

    Attributes:
        alert: The same.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(alert)
        self.alert = alert

    def __str__(self) -> str:
        return one_line(self.alert)


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{near(str(value), known)}")


def _function(what: str, value: Any, of: str = "an Alert") -> Any:
    if not callable(value):
        raise TypeError(f"{what} a function of {of}, got {value!r}")
    return value
