"""What optimizers do to their parameters: size of updates, and whether the second moment keeps up with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from traindiag.capture.optimizer_state import second_moments, skipped_itself
from traindiag.capture.parameter_sample import ParameterSample, Update
from traindiag.functional.optimizer import rms_t_squares
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.parameter_cells import joined_cells, joined_states, kept, ratio, reading
from traindiag.record.catalogue import BY_NAME
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_STATES = ("updates", "scalars", "weight", "change", "moments", "rms_t", "with_eps", "gradient_over_eps")
"""Per parameter: updates (shared among ranks); scalars that they reached and the sums of squares of their weight and
change; scalars with a gradient and a second moment and the sum for RMS_t; scalars with an epsilon above 0 as well and
the sum of squares of their gradient in units of it."""


class OptimizerMonitor(Monitor):
    """``optimizer/rms_t``, ``update_rms``, ``update_ratio``, ``grad_rms_over_eps`` and ``parameter_norm``.

    An update is what really happened to the parameter between the optimizer's being called and its having stepped:
    learning rate, weight decay and whatever else the optimizer does included, for any optimizer. Where an optimizer
    updates several times in a step, mean squares are taken over its updates.

    Of tensors with more than 4096 scalars that many evenly spaced ones are looked at, the same at every sample.
    ``rms_t`` and ``grad_rms_over_eps`` are not seen, rather than zero, where there is no second moment (SGD, Muon),
    no gradient or a sparse one; ``update_ratio`` is not where the weights are all zero.
    """

    name = "optimizer"
    family = "optimizer"
    lane = "slow"
    signals = tuple(
        BY_NAME[f"optimizer/{n}"]
        for n in ("rms_t", "update_rms", "update_ratio", "grad_rms_over_eps", "parameter_norm")
    )

    def __init__(self) -> None:
        self._updates: dict[str, Update] = {}
        self._states: dict[str, tuple[ParameterSample, Tensor]] = {}

    def before_update(self, optimizer: str, update: Update) -> None:
        update.remember()
        self._updates[optimizer] = update

    @torch.no_grad()
    def updated(self, optimizer: str) -> None:
        update = self._updates.pop(optimizer, None)
        if update is None or not update.sample.parameters:
            return
        sample = update.sample
        rows = [
            sample.share,
            sample.scalars(),
            sample.weights * sample.squares(update.before),
            sample.weights * update.change_squares,
            *_gradient_rows(update),
        ]
        states = torch.stack(rows)
        skipped = skipped_itself(update.optimizer)
        if skipped is not None:
            states = torch.where(skipped.to(states.device) > 0, 0.0, states)
        if optimizer in self._states:
            states = states + self._states[optimizer][1]
        self._states[optimizer] = (sample, states)

    def collect(self) -> Sequence[Group]:
        found, self._states = self._states, {}
        self._updates.clear()
        if not found:
            return ()
        cells = joined_cells(tuple(sample.cells for sample, _ in found.values()))
        return [Group("updates", cells, dict(zip(_STATES, joined_states(s for _, s in found.values()))))]

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        if (group := states.get("updates")) is None:
            return ()
        s, cells = group.sums, group.cells
        with np.errstate(invalid="ignore", over="ignore"):
            values = {
                "rms_t": (np.sqrt(ratio(s["rms_t"], s["moments"])), s["moments"] > 0),
                "update_rms": (np.sqrt(ratio(s["change"], s["scalars"])), s["scalars"] > 0),
                "update_ratio": (np.sqrt(ratio(s["change"], s["weight"])), s["weight"] != 0),
                "grad_rms_over_eps": (np.sqrt(ratio(s["gradient_over_eps"], s["with_eps"])), s["with_eps"] > 0),
                "parameter_norm": (np.sqrt(s["weight"] / np.maximum(s["updates"], 1)), s["scalars"] > 0),
            }
        return kept([reading(f"optimizer/{n}", cells, v, group.seen & seen) for n, (v, seen) in values.items()])


def _gradient_rows(update: Update) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states that need a gradient and a second moment, ``[n]`` each."""
    sample = update.sample
    moments = second_moments(update.optimizer, sample)
    if moments is None:
        return (torch.zeros_like(sample.weights),) * 4
    gradients = update.gradients
    seen = [a and b for a, b in zip(gradients.sampled, moments.there)]
    relative = rms_t_squares(
        gradients.flat, moments.values, sample.sizes, eps=moments.eps, correction=moments.correction
    )
    scalars = sample.scalars(seen)
    if isinstance(moments.eps, float):
        with_eps = scalars if moments.eps > 0 else torch.zeros_like(scalars)
    else:
        with_eps = scalars * (moments.eps > 0)
    in_eps = update.gradient_squares / (moments.eps * moments.eps or 1.0)
    return scalars, sample.weights * relative, with_eps, sample.weights * in_eps
