"""Work that goes on beside a training step, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar, cast

Result = TypeVar("Result")


class Aside(Generic[Result]):
    """At most one piece of work at a time; what it raises is raised where its result is taken.

    Meant for the backward pass, in which autograd lets go of the interpreter. The thread begins with the first piece
    of work and ends with :meth:`close`. It is a daemon, so that a rank that waits for one that died can still exit.

    Example:
        >>> aside = Aside[int]()
        >>> aside.start(lambda: 6 * 7)
        >>> aside.busy, aside.take(), aside.busy
        (True, 42, False)
        >>> aside.close()
    """

    def __init__(self) -> None:
        self._lines: tuple[_Work[Result], _Outcomes[Result]] | None = None
        self._thread: threading.Thread | None = None
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether there is a result that was not taken yet."""
        return self._busy

    def start(self, work: Callable[[], Result]) -> None:
        """Begins ``work``; the result of the work before it must have been taken."""
        if self._busy:
            raise RuntimeError("the result of the work under way must be taken before other work starts")
        if self._lines is None:
            self._lines = SimpleQueue(), SimpleQueue()
            self._thread = threading.Thread(target=_work_off, args=self._lines, name="traindiag", daemon=True)
            self._thread.start()
        self._busy = True
        self._lines[0].put(work)

    def wait(self) -> None:
        """Returns when nothing is going on; the result stays to be taken. Work does not wait for itself."""
        if self._lines is not None and self._busy and threading.current_thread() is not self._thread:
            self._lines[1].put(self._lines[1].get())

    def take(self, patience: float | None = None) -> Result:
        """The result, as soon as it is there.

        Args:
            patience: Seconds to wait; then the work is given up.

        Raises:
            TimeoutError: If it took longer.
        """
        if self._lines is None or not self._busy:
            raise RuntimeError("there is no work whose result could be taken")
        try:
            result, error = self._lines[1].get(timeout=patience)
        except Empty:
            self.close()  # what comes late must not be taken for the result of other work
            raise TimeoutError(f"no result after {patience} s") from None
        self._busy = False  # not earlier: after an interrupt the result is still to be taken
        if error is not None:
            raise error
        return cast(Result, result)

    def close(self) -> None:
        """Ends the thread when its work is done; a result that nobody took is dropped."""
        if self._lines is not None:
            self._lines[0].put(None)
        self._lines, self._busy = None, False


_Work = SimpleQueue[Callable[[], Result] | None]
_Outcomes = SimpleQueue[tuple[Result | None, BaseException | None]]


def _work_off(work: _Work[Result], outcomes: _Outcomes[Result]) -> None:
    while (piece := work.get()) is not None:
        try:
            outcomes.put((piece(), None))
        except BaseException as error:  # it belongs to whoever takes the result
            outcomes.put((None, error))
        del piece  # between steps nothing of a step is kept alive
