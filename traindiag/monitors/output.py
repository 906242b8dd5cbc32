"""Output logits: log Z and its square, their level, and how far the target stands out, per call site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from traindiag.capture.taps import LossCall, LossTap, Tap
from traindiag.capture.watched import Watched
from traindiag.functional.output import OutputStatistics, linear_output_statistics, output_statistics
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME, near
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_MEANS = {
    "log_z": ("log_z_sum", "tokens"),
    "z_loss": ("log_z_square_sum", "tokens"),
    "logit_mean": ("logit_mean_sum", "tokens"),
    "target_z_score": ("target_z_sum", "target_z_tokens"),
    "overconfidence": ("overconfidence_sum", "target_tokens"),
}
_MAXIMA = ("log_z_max_abs", "logit_max", "logit_max_negated")
_SUMS = tuple(name for name in OutputStatistics._fields if name not in _MAXIMA)
_UNLESS_RULED_OUT = ("logit_min", "logit_mean", "target_z_score")


class OutputMonitor(Monitor):
    """``output/log_z`` and its largest absolute value, ``z_loss``, the level of the logits, ``target_z_score`` and
    ``overconfidence``.

    Logits and targets are those of the cross-entropy calls that train. Where a fused loss never builds logits, they
    are computed for the tokens looked at, from the hidden states and the weight that it was given. A call under
    ``no_grad`` and a loss whose logits need no gradient (a frozen teacher's) do not count. Class probabilities are no
    targets: there is no target z-score then. Where a model rules classes out with a logit of ``-inf`` and log Z is
    finite, the smallest and the mean logit and the z-score have no meaning and are left out.

    Args:
        head: Name of the module whose output are the logits, for a model whose loss is not recognised.
        tokens: Number of tokens looked at in a call, at most.

    Raises:
        ValueError: If ``tokens`` is below 1; when the run begins, if there is no module called ``head``.

    Example:
        >>> OutputMonitor(head="lm_head").taps()[0].head
        'lm_head'
    """

    name = "output"
    family = "output"
    lane = "slow"
    signals = tuple(s for s in BY_NAME.values() if s.family == "output")

    def __init__(self, *, head: str | None = None, tokens: int = 128) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.head = head
        self.tokens = tokens
        self._sites: dict[str, OutputStatistics] = {}

    def prepare(self, watched: Watched) -> None:
        if self.head is not None and self.head not in watched.modules:
            hint = near(self.head, watched.modules)
            raise ValueError(f"head={self.head!r} is no module that is being trained.{hint}")

    def taps(self) -> Sequence[Tap]:
        return (LossTap(self._observe, self.head, self.tokens),)

    def _observe(self, call: LossCall) -> None:
        if call.logits is not None:
            new = output_statistics(call.logits, call.targets, ignore_index=call.ignore_index, tokens=self.tokens)
        elif call.hidden is not None and call.weight is not None:
            new = linear_output_statistics(
                call.hidden,
                call.weight,
                call.targets,
                bias=call.bias,
                ignore_index=call.ignore_index,
                tokens=self.tokens,
                scale=call.scale,
                softcap=call.softcap,
            )
        else:
            raise ValueError(f"a loss call at {call.site} has neither logits nor hidden and weight")
        before = self._sites.get(call.site)
        self._sites[call.site] = new if before is None else _joined(before, new)

    def collect(self) -> Sequence[Group]:
        sites, self._sites = self._sites, {}
        if not sites:
            return ()
        device = next(iter(sites.values())).tokens.device
        states = torch.stack([torch.stack(s).to(device, non_blocking=True) for s in sites.values()], 1)
        named = dict(zip(OutputStatistics._fields, states))
        return (
            Group(
                "sites",
                Cells.along("site", sites),
                sums={name: named[name] for name in _SUMS},
                maxima={name: named[name] for name in _MAXIMA},
            ),
        )

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        sites = states.get("sites")
        if sites is None:
            return ()
        some = sites.seen & (sites.sums["tokens"] > 0)
        found: dict[str, tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.int64] | None]] = {}
        for name, (total, count) in _MEANS.items():
            counts = sites.sums[count]
            with np.errstate(invalid="ignore"):
                found[name] = sites.sums[total] / np.maximum(counts, 1), sites.seen & (counts > 0), None
        for name in ("log_z_max_abs", "logit_max"):
            found[name] = sites.maxima[name], some, sites.ranks[name]
        smallest = -sites.maxima["logit_max_negated"]
        found["logit_min"] = smallest, some, sites.ranks["logit_max_negated"]
        ruled_out = (smallest == -np.inf) & np.isfinite(found["log_z"][0])
        readings = []
        for signal in self.signals:
            name = signal.name.split("/")[1]
            values, seen, ranks = found[name]
            if name in _UNLESS_RULED_OUT:
                seen = seen & ~ruled_out
            readings.append(Reading.masked(signal, sites.cells, values, seen, ranks))
        return readings


def _joined(a: OutputStatistics, b: OutputStatistics) -> OutputStatistics:
    """Of two micro-batches."""
    return OutputStatistics(
        *(torch.maximum(x, y) if name in _MAXIMA else x + y for name, x, y in zip(OutputStatistics._fields, a, b))
    )
