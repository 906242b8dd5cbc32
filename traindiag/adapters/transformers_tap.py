"""What stands on a Trainer while it trains, and how it is taken off again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from traindiag.adapters.batches import batch_size
from traindiag.engine.diagnostics import Diagnostics


class TrainerTap:
    """Watches ``training_step``, the one method of a Trainer in which a micro-batch's forward and backward pass lie.

    No callback hook will do: the loss is shown to none, gradients are clipped before the first one after the backward
    pass, and none at all is called on an exception. Here the loss is what the Trainer adds up, and when
    ``training_step`` returns from the last micro-batch gradients are accumulated and averaged over ranks, still to
    be unscaled and clipped.

    It knows its Trainer weakly and the user's callback not at all, so that it keeps neither of them alive.

    Args:
        trainer: The one that trains.
        diagnostics: Told what happens.
        first: A callback to be called before all others.
    """

    def __init__(self, trainer: Trainer, diagnostics: Diagnostics, first: TrainerCallback) -> None:
        self.diagnostics = diagnostics
        self.used = False
        self._trainer = weakref.ref(trainer)
        self._first = first
        self._loss: Tensor | None = None
        self._placed = False
        self._had_own = False
        self._stand_in: Callable[[], Any] = lambda: None

    def place(self) -> None:
        """Puts it on the Trainer; does nothing where it stands already."""
        trainer = self._trainer()
        if self._placed or trainer is None:
            return
        self._placed = True
        original, accelerator = trainer.training_step, trainer.accelerator

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not self._placed:  # somebody has wrapped this one and holds on to it
                return original(*args, **kwargs)
            return self._micro_batch(accelerator, original, args, kwargs)

        self._had_own = "training_step" in vars(trainer)
        vars(trainer)["training_step"] = training_step
        self._stand_in = weakref.ref(training_step)  # weakly: it holds the Trainer
        # a new list: the Trainer is walking over the present one
        trainer.callback_handler.callbacks = [self._first, *trainer.callback_handler.callbacks]

    def remove(self, *, failed: bool = False) -> None:
        """Takes everything off: the Trainer is as it was, no hook is left, and what was seen is judged."""
        trainer = self._trainer()
        if self._placed and trainer is not None:
            methods = vars(trainer)
            if (stand_in := methods.get("training_step")) is self._stand_in():
                del methods["training_step"]
                if self._had_own:
                    methods["training_step"] = stand_in.__wrapped__
            others = [c for c in trainer.callback_handler.callbacks if c is not self._first]
            trainer.callback_handler.callbacks = others
        self._placed, self._loss = False, None
        self.diagnostics.finish(failed=failed)

    def _micro_batch(
        self, accelerator: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.used = True
        diagnostics = self.diagnostics
        if diagnostics.run.batch_size is None:
            diagnostics.learn(batch_size=batch_size([*args[1:2], kwargs.get("inputs")]))
        try:
            diagnostics.begin()
            diagnostics.batch(args[1] if len(args) > 1 else kwargs.get("inputs"))
            diagnostics.judge_aside()
            loss = original(*args, **kwargs)
            diagnostics.end(step_done=False)  # nothing is installed between micro-batches
            # each is divided by their number, or by that of all tokens: the sum is the mean
            self._loss = loss if self._loss is None else self._loss + loss
            if accelerator.sync_gradients:
                diagnostics.loss(self._loss)
                self._loss = None
                # the scale as a device tensor: get_scale would wait for the device
                diagnostics.gradients(scale=getattr(accelerator.scaler, "_scale", None))
        except BaseException:
            self.remove(failed=True)
            raise
        return loss
