"""Alerts in a file, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from traindiag.alerts.alert import Alert


def read_alerts(path: str | Path) -> list[Alert]:
    """All alerts of a file, in its order. Lines that are no alert (cut short by a crash) are left out.

    Args:
        path: File; one that does not exist holds no alerts.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    alerts = []
    for line in lines:
        try:
            alerts.append(Alert.from_dict(json.loads(line)))
        except (ValueError, TypeError, AttributeError, KeyError):
            continue
    return alerts


class AlertFile:
    """Appends alerts to a file and never writes one twice.

    A resumed run repeats the steps since its checkpoint, and with them their alerts: what the file already holds is
    skipped. The file and its folder are made at the first alert.

    Args:
        path: The file, usually ``alerts.jsonl``.
        on_fault: Called with the first error of the disk. Errors are never raised: a full disk must not end a run.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "logs" / "alerts.jsonl"
        >>> alert = Alert("1f", "opened", "kl", "run", 0, 7, 0.0, None, "warning", "slow", "reward", "reward/kl", "",
        ...     30.0, 10.0, "threshold")
        >>> AlertFile(path).write([alert, alert]); AlertFile(path).write([alert])
        >>> len(read_alerts(path))
        1
    """

    def __init__(self, path: str | Path, *, on_fault: Callable[[OSError], None] | None = None) -> None:
        self.path = Path(path)
        self._on_fault = on_fault
        self._faulty = False
        self._written: set[tuple[str, str, str]] | None = None
        self._broken_line = False

    def write(self, alerts: Iterable[Alert]) -> None:
        """Appends what is new and flushes."""
        try:
            for alert in alerts:
                self._append(alert)
        except OSError as error:
            if not self._faulty and self._on_fault is not None:
                self._on_fault(error)
            self._faulty = True

    def _append(self, alert: Alert) -> None:
        if self._written is None:
            self._written = {_key(a) for a in read_alerts(self.path)}
            self._broken_line = _ends_within_a_line(self.path)
        if _key(alert) in self._written:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(alert.to_dict(), allow_nan=False, ensure_ascii=False)
        start = "\n" if self._broken_line else ""
        self._broken_line = True  # until the whole line is on the disk
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{start}{line}\n")
        self._broken_line = False
        self._written.add(_key(alert))


def _key(alert: Alert) -> tuple[str, str, str]:
    # An event may be escalated twice, to warning and to critical.
    return alert.id, alert.status, alert.severity


def _ends_within_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"
    except OSError:  # no file, or an empty one
        return False
