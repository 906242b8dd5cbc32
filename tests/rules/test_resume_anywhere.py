"""A run cut anywhere gives the verdicts of an unbroken one, through a checkpoint that loads weights only."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.rules.frames import X, frame, reading
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.rule import Rule, Verdict
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.shift import Shift
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold
from traindiag.rules.trend import Trend
from traindiag.rules.vanishing import Vanishing


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
        Threshold("user/x", above=25.0, waits=True, name="waits"),
        Threshold("user/x", below=12.0, fallen_from=15.0, persistence=2, name="fallen"),
    ]
    return RuleSet(made, strict=True)


def rules_on_signals() -> RuleSet:
    """Those that look for signals of their own."""
    made: list[Rule] = [
        NonFinite(),
        OutputDrift(window=4),
        StaleSecondMoment(share=0.1, settle=0.005),
        Vanishing(persistence=3),
        Growth("gradient/block_norm", factor=2.0, warns_with="output/log_z_max_abs", persistence=2),
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


ADAM = RunInfo(run_id="r", warmup=4, optimizers=(OptimizerInfo("adam", "AdamW", {"betas": [0.9, 0.999]}),))


def frames_of_signals(seed: int, count: int = 60) -> list[Frame]:
    """Logits that drift and rest, second moments that fall behind, a first block that loses its gradient; with holes.

    Output logits are there from step 12 on, at every other step, and a second stack and call site join.
    """
    rng = np.random.default_rng(seed)

    def values(*expected: float) -> list[float]:
        found = [v * math.exp(rng.normal(0, 0.02)) for v in expected]
        if rng.random() < 0.1:
            found[int(rng.integers(len(found)))] = float(rng.choice([math.nan, math.inf, 0.0]))
        return found

    def some(n: int) -> list[bool]:
        return (rng.random(n) < 0.95).tolist()

    made = []
    for step in range(count):
        stacks = ["a.0", "a.1", "b.0", "b.1"][: 2 if step < 15 else 4]
        b = 1e-10 if step < 44 else 1e-2
        norms = values(*[1e-9 if 20 <= step < 40 else 1e-5, 3.0 if step >= 48 else 1.0, b, 1.0][: len(stacks)])
        moments = values(1.0, 12.0 if step in (30, 31, 45) else 1.0)
        parameters = [("adam", "embed"), ("adam", "head")]
        order = slice(None, None, -1 if step % 9 == 0 else 1)
        blocks = Cells(("optimizer", "block"), tuple(("adam", s) for s in stacks))
        owned = Cells(("optimizer", "parameter"), tuple(parameters[order]))
        fast = [
            reading(norms, "gradient/block_norm", blocks, some(len(stacks))),
            reading(moments[order], "optimizer/sentinel_rms_t", owned, some(2)),
        ]
        made.append(frame(step, *fast, lane="fast", run=ADAM, learning_rates={"adam": 0.1}))
        if step >= 12 and step % 2 == 0:
            sites = Cells.along("site", ["lm", "aid"][: 1 if step < 20 else 2])
            drifts = values(8 * 1.15 ** min(step - 12, 26), 9.0)[: len(sites)]
            slow = [
                reading(drifts, "output/log_z_max_abs", sites, some(len(sites))),
                reading(values(2.0, 2.0)[: len(sites)], "output/target_z_score", sites, some(len(sites))),
                reading(values(0.2, 0.2)[: len(sites)], "output/overconfidence", sites, some(len(sites))),
            ]
            made.append(frame(step, *slow, run=ADAM, learning_rates={"adam": 0.1}))
    return made


def carried(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, object] = torch.load(buffer, weights_only=True)
    return loaded


Make, Measure = Callable[[], RuleSet], Callable[[int], list[Frame]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rules", "frames", "speak", "kinds"),
    [(rules, frames, 8, {"trend", "shift"}), (rules_on_signals, frames_of_signals, 5, {"trend", "threshold"})],
    ids=["x", "signals"],
)
def test_cut_anywhere(rules: Make, frames: Measure, speak: int, kinds: set[str], seed: int) -> None:
    series = frames(seed)
    whole = rules()
    unbroken: list[list[Verdict]] = [whole.update(f) for f in series]
    assert len({v.rule for said in unbroken for v in said}) >= speak  # a series that says something
    assert kinds <= {v.kind for said in unbroken for v in said}
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
