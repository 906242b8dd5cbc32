"""Monitors that run forward passes of their own, after the step, when they are due."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from traindiag.monitors.monitor import Monitor
from traindiag.record.frame import Frame


class ActiveMonitor(Monitor):
    """Base of monitors that run forward passes of their own.

    At the end of every step the engine asks :meth:`due`. Where it is, :meth:`probe` runs in a sandbox of all models:
    without gradients, on copies of buffers, with random states and training modes put back, in the precision that the
    trainer computes in, and compiled parts eagerly. Then ``collect`` hands over what it found.
    """

    lane = "active"

    @abstractmethod
    def due(self, step: int, updates: Mapping[str, int]) -> bool:
        """Whether to probe after this step: the same on all ranks, so by nothing but the arguments, what a checkpoint
        holds and reduced numbers. Asked once a step, and after a fault too, until all ranks know of it.

        Args:
            step: The step that ends.
            updates: Updates done so far, this step's included, by optimizer.
        """

    def start(self) -> None:
        """Before the first step of a run that does not resume one, in the same sandbox as :meth:`probe`."""

    @abstractmethod
    def probe(self, step: int) -> None:
        """Runs its forward passes."""

    def heed(self, frame: Frame) -> None:
        """Sees every frame of every lane in order, reduced, to plan. Calm steps come up to 16 steps late unless a
        rule of the run is impatient.
        """
