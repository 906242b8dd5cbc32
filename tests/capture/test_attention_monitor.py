"""What the attention monitor sends, and what it makes of what came back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.capture.oracle import reduced
from traindiag.capture.taps import AttentionCall
from traindiag.monitors.attention import AttentionMonitor
from traindiag.record.frame import Reading


def call(layer: str = "a", gain: float = 1.0, seed: int = 0, heads: int = 2, **kw: object) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    q, k = (gain * torch.randn(2, heads, 60, 8, generator=generator) for _ in range(2))
    return AttentionCall(layer, heads, query=q, key=k, scale=8**-0.5, **kw)  # type: ignore[arg-type]


def sample(monitor: AttentionMonitor, *calls: AttentionCall) -> dict[str, Reading]:
    (tap,) = monitor.taps()
    for one in calls:
        tap.observe(one)
    readings = monitor.readings({g.name: reduced(g) for g in monitor.collect()})
    monitor.feedback(readings)
    return {r.signal.name.split("/")[1]: r for r in readings}


def test_micro_batches_join_before_anything_is_computed() -> None:
    calls = [call(seed=1), call(seed=2, gain=3.0), call("b", seed=3)]
    found = sample(AttentionMonitor(exact=True), *calls)
    assert found["max_logit"].cells.coordinates == (("a", 0), ("a", 1), ("b", 0), ("b", 1))
    for head in range(2):
        z = [
            np.einsum("btd,bsd->bts", c.query[:, head].double(), c.key[:, head].double()) / 8**0.5 for c in calls[:2]
        ]
        assert found["max_logit"].values[head] == pytest.approx(max(x.max() for x in z), rel=1e-5)
        squares = np.concatenate([c.query[:, head].double().square().sum(-1).flatten() for c in calls[:2]])
        assert found["query_norm"].values[head] == pytest.approx(math.sqrt(squares.mean()), rel=1e-5)
        p = [np.exp(x - x.max(-1, keepdims=True)) for x in z]
        p = [x / x.sum(-1, keepdims=True) for x in p]
        entropy = np.concatenate([-(x * np.log(x)).sum(-1).flatten() for x in p]).mean()
        assert found["entropy"].values[head] == pytest.approx(entropy, rel=1e-4)
    assert sorted(found) == sorted(s.name.split("/")[1] for s in AttentionMonitor.signals)
    assert all(r.seen.all() for r in found.values())


def test_an_open_question_is_answered_at_the_next_sample() -> None:
    monitor, open_question, quiet = AttentionMonitor(rows=2), call("open", gain=4.5), call("quiet")
    first = sample(monitor, open_question, quiet)
    value, bound = first["max_logit"].values[:2], first["max_logit_bound"].values[:2]
    assert (value < 100).all()
    assert (bound > 100).all()
    assert monitor.state_dict() == {"exact_next": ["open"]}
    resumed = AttentionMonitor(rows=2)
    resumed.load_state_dict(monitor.state_dict())
    for again in (monitor, resumed):
        second = sample(again, open_question, quiet)
        np.testing.assert_array_equal(second["max_logit"].values[:2], second["max_logit_bound"].values[:2])
        assert (second["max_logit"].values[2:] < second["max_logit_bound"].values[2:]).all()
        assert again.state_dict() == {"exact_next": []}


def test_absent_is_not_nan_and_nan_is_not_absent() -> None:
    nothing = call("masked", mask=torch.zeros(60, 60, dtype=torch.bool))
    broken = call("broken")
    broken.query[0, 0, 5, 0] = math.nan
    scores = AttentionCall("scores", 1, scores=torch.zeros(1, 1, 4, 4))
    empty = AttentionCall("empty", 1, query=torch.zeros(0, 1, 4, 2), key=torch.zeros(0, 1, 4, 2))
    found = sample(AttentionMonitor(), nothing, broken, scores, empty)
    assert {c[0] for c in found["max_logit"].cells.coordinates} == {"masked", "broken", "scores"}
    for signal in ("max_logit", "max_logit_bound", "logit_range", "entropy"):
        assert found[signal].seen.tolist() == [False, False, True, True, True]
    for signal in ("max_logit", "max_logit_bound", "query_norm"):
        assert math.isnan(found[signal].values[2])
        assert not math.isnan(found[signal].values[3])
    assert found["query_norm"].seen.tolist() == [True, True, True, True, False]
    assert found["entropy"].values[4] == pytest.approx(math.log(4))


def test_two_attentions_of_different_shape_in_one_module() -> None:
    found = sample(AttentionMonitor(), call("a"), call("a", heads=3), call("a", heads=3))
    layers = [c[0] for c in found["max_logit"].cells.coordinates]
    assert layers == ["a"] * 2 + ["a (3 heads)"] * 3


def test_nothing_seen_is_nothing_sent() -> None:
    monitor = AttentionMonitor()
    assert sample(monitor) == {}
    monitor.taps()[0].observe(call())
    monitor.discard()
    assert monitor.collect() == ()


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        AttentionMonitor(rows=0)
    with pytest.raises(ValueError, match="neither scores nor query and key"):
        AttentionMonitor().taps()[0].observe(AttentionCall("a", 1))
