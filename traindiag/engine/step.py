"""What a loop of one's own tells within a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from traindiag.engine.diagnostics import Diagnostics


class Step:
    """One step of a loop that is yours, from :meth:`Diagnostics.step`."""

    def __init__(self, diagnostics: Diagnostics) -> None:
        self._diagnostics = diagnostics

    def loss(self, value: Tensor, optimizer: str | None = None) -> Tensor:
        """Takes the loss of one micro-batch, before any division by the accumulation, and gives it back."""
        self._diagnostics.loss(value, optimizer)
        self._diagnostics.judge_aside()
        return value

    def batch(self, batch: object, place: str = "") -> None:
        """Tells which batch is being trained on, for ``batch_id`` of the settings; see :meth:`Diagnostics.batch`."""
        self._diagnostics.batch(batch, place)

    def gradients(self, optimizer: str | None = None, *, scale: Tensor | float | None = None) -> None:
        """Call it when gradients are complete and unscaled, before clipping."""
        self._diagnostics.gradients(optimizer, scale=scale)
