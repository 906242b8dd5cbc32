"""Alerts to a chat room or a service, from a thread that training never waits for.

The standard library sends them: one small POST with a timeout needs no other package, and proxies of the environment
are honoured.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from traindiag.alerts.actions import Selective
from traindiag.alerts.alert import Alert, Status
from traindiag.alerts.text import one_line
from traindiag.record.signal import Clock
from traindiag.rules.rule import Severity

PATIENCE = 3.0
"""Seconds that the end of a run waits for what was not sent yet."""

_LONGEST_WAIT = 60.0
_HIDDEN = "not shown, as it may hold a secret"


class Webhook(Selective):
    """Posts alerts as JSON that Slack and what is compatible with it understand: ``{"text": ..., "alert": {...}}``.

    Sent by the first rank, in the background. Where the service does not answer, it is asked again after ``backoff``
    seconds, twice that, and so on. What is lost is told once, and training goes on. The address is a secret: it is
    in no text that this package writes. Other programs may write down what a callback was built with (Lightning's
    command line keeps its configuration beside the log), so leave it in an environment variable.

    Args:
        url: The address.
        env: Name of an environment variable that holds it, in place of ``url``.
        timeout: Seconds until an attempt counts as failed.
        attempts: How often one alert is tried.
        backoff: Seconds before the second attempt.
        queue: Alerts that may wait; further ones are dropped.
        severity: See :class:`~traindiag.alerts.actions.Selective`, as for the rest.
        clock: See there.
        diagnosis: See there.
        status: See there.

    Raises:
        ValueError: If there is no address, it is none, or another argument is wrong.

    Example:
        >>> Webhook("https://hooks.slack.com/services/T0/B0/secret", severity="critical")
        Webhook(url=<hidden>, severity='critical')
    """

    everywhere = False

    def __init__(
        self,
        url: str | None = None,
        *,
        env: str | None = None,
        timeout: float = 5.0,
        attempts: int = 5,
        backoff: float = 1.0,
        queue: int = 100,
        severity: Severity = "warning",
        clock: Clock | None = None,
        diagnosis: str = "*",
        status: Sequence[Status] = ("opened", "escalated"),
    ) -> None:
        super().__init__(severity=severity, clock=clock, diagnosis=diagnosis, status=status)
        if (url is None) == (env is None):
            raise ValueError("Webhook needs either url= or env=, the name of an environment variable that holds it")
        for name, number in (("timeout", timeout), ("backoff", backoff)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise ValueError(f"{name} must be a number of seconds above 0, got {number!r}")
        for name, count in (("attempts", attempts), ("queue", queue)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
        self.env = env
        self.timeout, self.attempts, self.backoff, self.queue = timeout, attempts, backoff, queue
        self._url = _address(url, env)
        self._post: _Post | None = None

    def __call__(self, alert: Alert) -> None:
        """Hands it over and returns at once."""
        if self.wants(alert):
            if self._post is None:
                self._post = _Post(self)
            self._post.put(alert)

    def problems(self) -> list[str]:
        """What went wrong and was not told yet, in words that hold nothing secret."""
        return self._post.problems() if self._post is not None else []

    def finish(self, patience: float = PATIENCE) -> list[str]:
        """Waits a little for what is under way, tries once more what was to be tried later, and ends the thread."""
        post, self._post = self._post, None
        return post.finish(patience) if post is not None else []

    def __repr__(self) -> str:
        told = ["url=<hidden>" if self.env is None else f"env={self.env!r}"]
        return f"Webhook({', '.join([*told, *(f'{k}={v!r}' for k, v in self.settings().items())])})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_post": None}  # a copy in another process has a thread of its own


class _Post:
    """A queue and the thread that empties it."""

    def __init__(self, hook: Webhook) -> None:
        self._hook = hook
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._hurry = threading.Event()
        self._problems: deque[str] = deque()
        self._told_loss = self._told_full = False
        self._open = 0  # alerts that were handed over and are neither sent nor given up
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="traindiag-webhook", daemon=True)
        self._thread.start()

    def put(self, alert: Alert) -> None:
        if self._open < self._hook.queue:
            with self._lock:
                self._open += 1
            self._queue.put(payload(alert))
        elif not self._told_full:
            self._told_full = True
            self._problems.append(
                f"more than {self._hook.queue} alerts wait for the webhook: some are not sent; training goes on"
            )

    def problems(self) -> list[str]:
        told = []
        while self._problems:
            told.append(self._problems.popleft())
        return told

    def finish(self, patience: float) -> list[str]:
        self._hurry.set()
        self._queue.put(None)
        self._thread.join(patience)
        left = self._open
        if left and not self._told_loss:
            alerts = "1 alert was" if left == 1 else f"{left} alerts were"
            self._problems.append(f"{alerts} not sent to the webhook: it took longer than {patience:g} s")
        return self.problems()

    def _work(self) -> None:
        while (body := self._queue.get()) is not None:
            cause = self._send(body)
            with self._lock:
                self._open -= 1
            if cause is not None and not self._told_loss:
                self._told_loss = True  # once: a service that is down stays down for more than one alert
                self._problems.append(f"the webhook does not get alerts: {cause}; training goes on")

    def _send(self, body: bytes) -> str | None:
        """Posts until it is accepted; otherwise why it was not."""
        wait = self._hook.backoff
        for attempt in range(1, self._hook.attempts + 1):
            cause, again, asked = self._try(body)
            if cause is None:
                return None
            if not again or attempt == self._hook.attempts or self._hurry.is_set():
                break
            self._hurry.wait(min(max(wait, asked), _LONGEST_WAIT))
            wait *= 2
        return f"{cause} ({attempt} attempt{'s' * (attempt != 1)})"

    def _try(self, body: bytes) -> tuple[str | None, bool, float]:
        """One attempt: what was wrong, whether another one makes sense, seconds that the service asks for.

        No message of an exception is handed on: several hold the address.
        """
        try:
            request = urllib.request.Request(
                self._hook._url, body, {"Content-Type": "application/json", "User-Agent": "traindiag"}
            )
            with _OPENER.open(request, timeout=self._hook.timeout):
                return None, False, 0.0
        except urllib.error.HTTPError as error:
            with error:
                asked = error.headers.get("Retry-After", "") if error.headers else ""
            again = error.code >= 500 or error.code in (408, 425, 429)
            return f"it answers with HTTP {error.code}", again, float(asked) if asked.isdecimal() else 0.0
        except Exception as error:
            return _in_words(error), True, 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An alert goes to the address that was given and to no other; a redirected POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def payload(alert: Alert) -> bytes:
    r"""The body of a message: words to read, with what Slack reads as markup escaped, and the alert as data.

    Example:
        >>> alert = Alert("1f", "opened", "kl", "run", 0, 120, 0.0, None, "warning", "slow", "reward", "reward/kl",
        ...     "<b>", float("nan"), 10.0, "threshold", title="KL is high")
        >>> json.loads(payload(alert))["text"]
        'WARNING step 120: KL is high (reward/kl nan, limit 10)\n&lt;b&gt;'
    """
    lines = [one_line(alert), alert.where, alert.remedies[0].text if alert.remedies else ""]
    text = "\n".join(line for line in lines if line)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return json.dumps({"text": text, "alert": alert.to_dict()}, allow_nan=False).encode()


def _in_words(error: Exception) -> str:
    """What an error is, by its kind and its number, and not by what it says."""
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, Exception) else error
    if isinstance(cause, socket.gaierror):
        return "its host is not found"
    kind = type(cause)
    if kind.__module__ == "builtins" and isinstance(cause, OSError) and cause.errno:  # others number in their own way
        return f"{kind.__name__}: {os.strerror(cause.errno)}"
    return kind.__name__


def _address(url: str | None, env: str | None) -> str:
    if env is not None:
        url = os.environ.get(env)
        if not url:
            raise ValueError(f"Webhook: the environment variable {env!r} is not set")
    place = "url" if env is None else f"the environment variable {env!r}"
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        good = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
        good = good and isinstance(url, str) and url.isascii() and url.isprintable() and " " not in url
        good = good and parts is not None and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not isinstance(url, str):
        raise ValueError(f"Webhook: {place} must be an address that begins with https://; what it is is {_HIDDEN}")
    return url
