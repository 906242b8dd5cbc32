"""A run cut anywhere gives the verdicts of an unbroken one, through a checkpoint that loads weights only."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from tests.rules.frames import X, frame, reading
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.rule import Rule, Verdict
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.shift import Shift
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold
from traindiag.rules.trend import Trend


def rules() -> RuleSet:
    made: list[Rule] = [
        NonFinite(),
        Threshold("user/x", above=50.0, below=0.5, persistence=2),
        Threshold("user/x", above=20.0, inherit=True, where="[ab]", name="inherited"),
        Forecast("user/x", limit=200.0),
        Spike("user/x", window=12, rising=2),
        Spike("user/x", direction="both", where="[abc]"),
        Shift("user/x", direction="both", min_samples=16, limit=5.5, logarithm=True),
        Trend("user/x", growth_per_1000=1.2, direction="both", window=64, min_samples=12),
        Growth("user/x", factor=2.0, critical_factor=6.0, samples=4, persistence=2, settled=True),
        Threshold("user/x", above=20.0, below=10.0, share=0.5, fallen_from=15.0, name="share"),
    ]
    return RuleSet(made, strict=True)


def frames(seed: int, count: int = 60) -> list[Frame]:
    """Growth, noise, jumps, bad values and unseen cells, in cells that join and change places."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(count):
        names = list("ab" if step < 20 else "abc" if step < 40 else "cadb")
        if step % 7 == 0:
            rng.shuffle(names)
        rates = {"a": 0.08, "b": 0.02, "c": -0.02, "d": 0.1}
        values = [15 * math.exp(rates[n] * step + rng.normal(0, 0.05)) for n in names]
        if rng.random() < 0.15:
            values[int(rng.integers(len(names)))] *= float(rng.choice([30.0, 0.01, math.nan, math.inf]))
        seen = (rng.random(len(names)) < 0.9).tolist()
        rates = {"adam": min(step, 8) / 8 * (0.3 if step >= 50 else 1.0)}  # warm-up and a jump
        made.append(frame(step, reading(values, X, Cells.along("place", names), seen), learning_rates=rates))
    return made


def carried(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, object] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere(seed: int) -> None:
    series = frames(seed)
    whole = rules()
    unbroken: list[list[Verdict]] = [whole.update(f) for f in series]
    assert len({v.rule for said in unbroken for v in said}) >= 6  # a series that says something
    assert {"trend", "shift"} <= {v.kind for said in unbroken for v in said}
    for cut in (*range(0, len(series), 3), 50):  # at 50 the learning rate jumps
        first, second = rules(), rules()
        for f in series[:cut]:
            first.update(f)
        second.load_state_dict(carried(first.state_dict()))
        assert repr([second.update(f) for f in series[cut:]]) == repr(unbroken[cut:])  # NaN is not equal to itself
        assert repr(second.state_dict()) == repr(whole.state_dict())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_cells_changes_nothing(seed: int) -> None:
    """Cells in a fixed order against cells that change places: the same cells are found."""
    straight, turned = rules(), rules()
    for f in frames(seed):
        r = f.readings["user/x"]
        order = np.argsort([str(c) for c in r.cells], kind="stable")
        cells = Cells(r.cells.axes, tuple(r.cells.coordinates[i] for i in order))
        turned_back = type(r)(r.signal, cells, r.values[order], r.seen[order])
        same = frame(f.step, turned_back, learning_rates=f.learning_rates)
        a, b = turned.update(f), straight.update(same)
        assert [(v.rule, v.active, v.severity, v.others) for v in a] == [
            (v.rule, v.active, v.severity, v.others) for v in b
        ]
        assert [v.cell for v in a if v.kind != "nonfinite"] == [v.cell for v in b if v.kind != "nonfinite"]
