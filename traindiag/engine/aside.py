"""Work that goes on beside a training step, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

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
        self._queue: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None] | None = None
        self._work: Future[Result] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a result that was not taken yet."""
        return self._work is not None

    def start(self, work: Callable[[], Result]) -> None:
        """Begins ``work``; the result of the work before it must have been taken."""
        if self._work is not None:
            raise RuntimeError("the result of the work under way must be taken before other work starts")
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_work_off, args=(self._queue,), name="traindiag", daemon=True).start()
        self._work = Future()
        self._queue.put((self._work, work))

    def wait(self) -> None:
        """Returns when nothing is going on; the result stays to be taken."""
        if self._work is not None:
            self._work.exception()

    def take(self, patience: float | None = None) -> Result:
        """The result, as soon as it is there.

        Args:
            patience: Seconds to wait; then the work is given up.

        Raises:
            TimeoutError: If it took longer.
        """
        if self._work is None:
            raise RuntimeError("there is no work whose result could be taken")
        work, self._work = self._work, None
        return work.result(patience)

    def close(self) -> None:
        """Ends the thread when its work is done; a result that nobody took is dropped."""
        if self._queue is not None:
            self._queue.put(None)
        self._queue = self._work = None


def _work_off(queue: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None]) -> None:
    while (item := queue.get()) is not None:
        future, work = item
        try:
            future.set_result(work())
        except BaseException as error:  # it belongs to whoever takes the result
            future.set_exception(error)
        del item, future, work  # between steps nothing of a step is kept alive
