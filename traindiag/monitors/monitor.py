"""What a monitor is: it turns what happens in a step into states, and reduced states into readings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from traindiag.capture.parameter_sample import Update
from traindiag.capture.taps import Tap
from traindiag.capture.watched import Watched
from traindiag.record.frame import Reading
from traindiag.record.signal import Lane, Signal
from traindiag.transfer.states import Group, Reduced


class Monitor(ABC):
    """Base of all monitors. A monitor measures and never judges.

    The engine calls ``prepare`` once, then in every measured step the events below as they happen, ``collect`` at
    the end of the step, and ``readings`` one step later with what all ranks made of it. Nothing in an event may
    wait for the device, draw a random number or keep an activation.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    lane: ClassVar[Lane]
    signals: tuple[Signal, ...]
    costly: ClassVar[bool] = False
    """On the fast lane: left to the samples where measuring every step takes more than half of the budget."""
    early: ClassVar[bool] = False
    """On the slow lane: measured in a few of the first steps too, whatever the cadence, and alone in them."""
    impatient: ClassVar[bool] = False
    """Whether it plans by what is measured every step: each step is judged one step later then, calm or not."""

    def companions(self) -> Sequence[Monitor]:
        """Monitors that it needs on other lanes; they join the run with it."""
        return ()

    def taps(self) -> Sequence[Tap]:
        """Where in the forward pass it wants to look."""
        return ()

    def prepare(self, watched: Watched) -> None:
        """Called before the first measured step, and again when the optimizers change."""

    def loss(self, optimizer: str, value: Tensor) -> None:
        """A micro-batch's loss, a detached 0-d tensor, not divided by the accumulation."""

    def gradients(self, optimizer: str, *, applied: bool, scale: Tensor | float | None = None) -> None:
        """Gradients of ``optimizer`` are complete.

        Args:
            optimizer: Its name in :class:`Watched`.
            applied: True where they are seen only as the optimizer uses them, after any clipping.
            scale: What they are still multiplied by (a loss scale that the optimizer removes itself).
        """

    def applied(self, optimizer: str, *, scale: Tensor | float | None = None) -> None:
        """Gradients that :meth:`gradients` has shown before any clipping are now as ``optimizer`` is about to use
        them. Told in sampled steps; of several calls before :meth:`updated` the last one holds.

        Args:
            optimizer: Its name in :class:`Watched`.
            scale: What they are still multiplied by.
        """

    def before_update(self, optimizer: str, update: Update) -> None:
        """``optimizer`` is about to step, in a step that the monitor's lane measures.

        Its gradients may not be complete yet: Lightning computes them inside the step.

        Args:
            optimizer: Its name in :class:`Watched`.
            update: A sample of its parameters, shared by all monitors. Keep it until :meth:`updated`.
        """

    def updated(self, optimizer: str) -> None:
        """``optimizer`` has stepped."""

    def data_changed(self) -> None:
        """From the step under way on batches come from another data set."""

    @abstractmethod
    def collect(self) -> Sequence[Group]:
        """Hands over the states of this step and forgets them."""

    @abstractmethod
    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        """Computes signals on the host from reduced states, by group name. Absent groups are left out."""

    def feedback(self, readings: Sequence[Reading]) -> None:
        """Sees its own reduced readings, the same on all ranks, to plan the next sample."""

    def discard(self) -> None:
        """Forgets the states of a step that will not be sent."""
        self.collect()

    def close(self) -> None:
        """Removes what it has installed, at the end of the run or when it is switched off; ``prepare`` may follow."""

    def state_dict(self) -> dict[str, Any]:
        """Plain, rank-independent data; empty for a monitor that remembers nothing between samples."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
