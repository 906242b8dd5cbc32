"""Attention logits, what softmax feels of them, entropy, and the norms that drive them, per layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from traindiag.capture.taps import AttentionCall, AttentionTap, Tap
from traindiag.functional.attention import AttentionStatistics, attention_statistics, score_statistics
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_MAXIMA = ("max_logit", "max_logit_bound", "logit_range")
_MEANS = {"entropy": ("entropy_sum", "entropy_rows")}
_ROOT_MEANS = {
    "query_norm": ("query_square_sum", "query_rows"),
    "key_norm": ("key_square_sum", "key_rows"),
}
_SIGNALS = {name: BY_NAME[f"attention/{name}"] for name in (*_MAXIMA, *_MEANS, *_ROOT_MEANS)}
_SUMS = tuple(name for pair in (*_MEANS.values(), *_ROOT_MEANS.values()) for name in pair)


class AttentionMonitor(Monitor):
    """``attention/max_logit``, its bound, ``logit_range``, ``entropy``, ``query_norm`` and ``key_norm``.

    Of a fused kernel a few rows are computed and the others bounded. Where the bound leaves open whether a logit is
    above ``limit``, the layer is computed in full at the next sample.

    Args:
        exact: Compute every logit at every sample (a sixth of a step in our measurements).
        rows: Rows computed per head and batch item, twice: with the highest ceilings and evenly spaced.
        limit: The first logit that a rule asks about.

    Raises:
        ValueError: If ``rows`` is below 1.
    """

    name = "attention"
    family = "attention"
    lane = "slow"
    signals = tuple(_SIGNALS.values())

    def __init__(self, *, exact: bool = False, rows: int = 16, limit: float = 100.0) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.exact = exact
        self.rows = rows
        self.limit = limit
        self._exact_next: frozenset[str] = frozenset()
        self._layers: dict[str, AttentionStatistics] = {}

    def taps(self) -> Sequence[Tap]:
        return (AttentionTap(self._observe),)

    def _observe(self, call: AttentionCall) -> None:
        if call.scores is not None:
            if not call.scores.numel():
                return
            new = score_statistics(call.scores, query=call.query, key=call.key, rows=self.rows)
        elif call.query is not None and call.key is not None:
            if not (call.query.numel() and call.key.numel()):
                return
            new = attention_statistics(
                call.query,
                call.key,
                mask=call.mask,
                is_causal=call.is_causal,
                scale=call.scale,
                logsumexp=call.logsumexp,
                rows=self.rows,
                exact=self.exact or call.layer in self._exact_next,
            )
        else:
            raise ValueError(f"an attention call of {call.layer} has neither scores nor query and key")
        layer = call.layer
        if layer in self._layers and len(self._layers[layer].max_logit) != call.heads:
            layer = f"{layer} ({call.heads} heads)"  # two attentions of different shape in one module
        self._layers[layer] = _joined(self._layers[layer], new) if layer in self._layers else new

    def collect(self) -> Sequence[Group]:
        layers, self._layers = self._layers, {}
        if not layers:
            return ()
        coordinates = tuple((layer, head) for layer, s in layers.items() for head in range(len(s.max_logit)))
        device = next(iter(layers.values())).max_logit.device

        def joined(name: str) -> Tensor:
            return torch.cat([_state(s, name).to(device, non_blocking=True) for s in layers.values()])

        return (
            Group(
                "heads",
                Cells(("layer", "head"), coordinates),
                sums={name: joined(name) for name in _SUMS},
                maxima={name: joined(name) for name in _MAXIMA},
            ),
        )

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        heads = states.get("heads")
        if heads is None:
            return ()
        found = []
        for name in _MAXIMA:
            largest = heads.maxima[name]
            # The maximum over nothing: every key masked.
            seen = heads.seen & (largest != -np.inf)
            found.append(Reading.masked(_SIGNALS[name], heads.cells, largest, seen, heads.ranks[name]))
        for name, (total, count) in (_MEANS | _ROOT_MEANS).items():
            counts = heads.sums[count]
            seen = heads.seen & (counts > 0)
            with np.errstate(invalid="ignore"):
                values = heads.sums[total] / np.maximum(counts, 1)
                values = np.sqrt(values) if name in _ROOT_MEANS else values
            found.append(Reading.masked(_SIGNALS[name], heads.cells, values, seen))
        return found

    def feedback(self, readings: Sequence[Reading]) -> None:
        by_name = {r.signal.name: r for r in readings}
        value, bound = by_name.get("attention/max_logit"), by_name.get("attention/max_logit_bound")
        if value is None or bound is None:
            self._exact_next = frozenset()
            return
        open_question = (bound.values > self.limit) & (value.values < self.limit) & value.seen
        self._exact_next = frozenset(str(value.cells.coordinates[i][0]) for i in np.flatnonzero(open_question))

    def state_dict(self) -> dict[str, Any]:
        return {"exact_next": sorted(self._exact_next)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._exact_next = frozenset(state["exact_next"])


def _joined(a: AttentionStatistics, b: AttentionStatistics) -> AttentionStatistics:
    """Of two micro-batches; the larger of two bounds holds for both."""
    maxima = {n: torch.maximum(getattr(a, n), getattr(b, n)) for n in _MAXIMA}
    return a._replace(**maxima, **{n: _state(a, n) + _state(b, n) for n in _SUMS})


def _state(statistics: AttentionStatistics, name: str) -> Tensor:
    """A sum that was not measured has a count of zero."""
    value: Tensor | None = getattr(statistics, name)
    return torch.zeros_like(statistics.max_logit) if value is None else value
