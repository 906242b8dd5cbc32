"""True attention logits of a run, found another way: fp64 products inside replaced torch functions or projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from traindiag.capture.names import watch
from traindiag.capture.taps import AttentionCall, AttentionTap
from traindiag.capture.window import Capture
from traindiag.monitors.attention import AttentionMonitor
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.transfer.states import Reduced

LOW = -1e8


@contextmanager
def true_logits() -> Iterator[list[Tensor]]:
    """Largest logit per head of every attention in the block, in order, fp64 ``[heads]``.

    Replaces ``F.scaled_dot_product_attention`` and the two softmaxes by functions that look at what the model
    passes, run without any capture. Softmax inputs must be ``[batch, heads, rows, columns]``.
    """
    found: list[Tensor] = []
    fused, softmax = F.scaled_dot_product_attention, F.softmax

    def see_fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k = query.detach(), key.detach()
        if torch.is_autocast_enabled("cpu"):
            q, k = q.bfloat16(), k.bfloat16()
        q, k = q.double().numpy(), k.double().numpy()
        k = np.repeat(k, q.shape[-3] // k.shape[-3], -3)
        z = np.einsum("...td,...sd->...ts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            z = np.where(np.tri(*z.shape[-2:]) > 0, z, -np.inf)
        if attn_mask is not None:
            m = attn_mask.detach()
            if torch.is_autocast_enabled("cpu") and m.is_floating_point():
                m = m.bfloat16().float()
            m = m.numpy()
            z = np.where(m, z, -np.inf) if m.dtype == bool else z + m.astype(float)
        found.append(torch.tensor(np.where(z <= LOW, -np.inf, z).max((0, 2, 3))))
        return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def see_softmax(input, dim=None, _stacklevel=3, dtype=None):
        if input.ndim == 4 and dim == -1:
            z = input.detach().double().numpy()
            found.append(torch.tensor(np.where(z <= LOW, -np.inf, z).max((0, 2, 3))))
        return softmax(input, dim, _stacklevel, dtype)

    F.scaled_dot_product_attention, F.softmax = see_fused, see_softmax
    try:
        yield found
    finally:
        F.scaled_dot_product_attention, F.softmax = fused, softmax


class Sample:
    """One sampled step: what the capture told, and what the monitor made of it."""

    def __init__(self, model: nn.Module, forward: Callable[[], Tensor], *, backward: bool = True, **kw: Any) -> None:
        monitor = AttentionMonitor(**kw)
        self.calls: list[tuple[str, bool]] = []

        def observe(call: AttentionCall) -> None:
            self.calls.append((call.layer, call.logsumexp is not None))
            monitor.taps()[0].observe(call)

        self.capture = Capture()
        self.capture.prepare(watch(model, torch.optim.SGD(model.parameters(), lr=0.1)), [AttentionTap(observe)])
        self.capture.open()
        loss = forward()
        self.capture.pause()
        if backward:
            loss.backward()
        self.capture.resume()
        self.capture.close()
        self.readings = {}
        for group in monitor.collect():
            self.readings = {r.signal.name.split("/")[1]: r for r in monitor.readings({"heads": reduced(group)})}

    @property
    def layers(self) -> list[str]:
        return [layer for layer, _ in self.calls]

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        return self.capture.coverage()

    def of(self, signal: str, layer: str) -> Tensor:
        reading = self.readings[signal]
        at = [i for i, c in enumerate(reading.cells.coordinates) if c[0] == layer]
        return torch.tensor(reading.values[at]).double()


def reduced(group: Any) -> Reduced:
    """As one rank alone would reduce it."""
    n = len(group.cells)
    assert isinstance(group.cells, Cells)
    return Reduced(
        group.cells,
        np.ones(n, bool),
        {k: v.double().numpy() for k, v in group.sums.items()},
        {k: v.float().numpy() for k, v in group.maxima.items()},
        {k: np.zeros(n, np.int64) for k in group.maxima},
    )


def assert_brackets(sample: Sample, truths: list[Tensor], *, rtol: float = 1e-6) -> None:
    """Value <= truth <= bound per call, and equality where the log-sum-exp can certify it."""
    assert len(sample.calls) == len(truths) > 0
    for (layer, with_lse), truth in zip(sample.calls, truths, strict=True):
        value, bound = sample.of("max_logit", layer), sample.of("max_logit_bound", layer)
        slack = rtol * (1 + truth.abs())
        assert (value <= truth + slack).all(), (layer, value, truth)
        assert (truth <= bound + slack).all(), (layer, bound, truth)
        if with_lse and (truth >= 15).all():
            torch.testing.assert_close(value, truth, rtol=10 * rtol, atol=0)
            assert torch.equal(value, bound)


def scale_up(model: nn.Module, factor: float, *names: str) -> None:
    """Makes logits large by scaling query and key weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(n in name for n in names) and not math.isnan(factor):
                parameter.mul_(factor)
