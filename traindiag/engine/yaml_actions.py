"""Actions as a settings file names them: by the names of Python, and no code but that of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from traindiag.alerts.actions import Call, Raise, SaveCheckpoint, StopTraining
from traindiag.alerts.alert import Status
from traindiag.alerts.webhook import Webhook
from traindiag.record.catalogue import near
from traindiag.record.signal import Clock
from traindiag.rules.rule import Severity
from traindiag.rules.yaml_file import PLUGINS


class NamedCall(Call):
    """:class:`Call` of a function that an installed package offers.

    Args:
        function: Name of an entry point of the group ``traindiag.plugins``.
        severity: See :class:`~traindiag.alerts.actions.Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Raises:
        ValueError: If no package offers it, with the names that there are.
        TypeError: If it is no function.
    """

    def __init__(
        self,
        function: str,
        *,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        found = _offered(function)
        super().__init__(found, severity=severity, clock=clock, diagnosis=diagnosis, status=status)


class StoredCheckpoint(SaveCheckpoint):
    """:class:`SaveCheckpoint` by the trainer at hand: a file cannot hold a function."""

    def __init__(
        self,
        *,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        super().__init__(severity=severity, clock=clock, diagnosis=diagnosis, status=status)


ACTIONS: Mapping[str, Callable[..., Any]] = {
    "StopTraining": StopTraining,
    "SaveCheckpoint": StoredCheckpoint,
    "Call": NamedCall,
    "Raise": Raise,
    "Webhook": Webhook,
}


def _offered(name: str) -> Any:
    plugins = {point.name: point for point in entry_points(group=PLUGINS)}
    if name not in plugins:
        known = f"one of {', '.join(plugins)}" if plugins else f"an entry point of {PLUGINS}, and there is none"
        raise ValueError(f"no installed package offers a function {name!r}, expected {known}.{near(name, plugins)}")
    return plugins[name].load()
