"""An absolute limit on gradients against epsilon is crossed for good by those that are zero by construction."""

from __future__ import annotations

import math

from tests.field_bugs.pack import told, warnings
from tests.rules.frames import frame, reading
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.record.run_info import RunInfo

MATRIX = [300.0, 280.0, 310.0, 290.0, 305.0, 300.0, 295.0, 300.0]
SERIES = {
    "key.bias": [1e-2, 3e-3, 2e-2, 1e-2, 5e-3, 1e-2, 2e-2, 1e-2],  # softmax cancels it: round-off
    "lora_A": [0.0, 2.0, 50.0, 120.0, 150.0, 160.0, 170.0, 150.0],
    "behind_a_zero": [0.0, 0.0, 3.0, 60.0, 150.0, 160.0, 170.0, 150.0],
    "embedding.rare": [150.0, 0.0, 140.0, 0.0, 0.0, 160.0, 0.0, 155.0],
    "matrix": MATRIX,
}
PARAMETERS = Cells(("optimizer", "parameter"), tuple(("adam", name) for name in SERIES))


def frames(first: float | None = None) -> list[Frame]:
    run = RunInfo(run_id="r", precision="16-mixed" if first else None)
    made = []
    for i in range(len(MATRIX)):
        values = [series[i] if i or first is None else first for series in SERIES.values()]
        rms = reading([1e-8 * v for v in values], "gradient/rms", PARAMETERS)
        made.append(frame(10 * i, rms, run=run))
        made.append(frame(10 * i, reading(values, "optimizer/grad_rms_over_eps", PARAMETERS), run=run))
    return made


def test_nothing_is_warned_of() -> None:
    alerts = told(frames())
    assert warnings(alerts) == []
    assert [a.rule for a in alerts][:1] == ["gradient/structural-zeros"]


def test_an_overflow_is_no_height_to_fall_from() -> None:
    assert {rule for _, rule, _ in warnings(told(frames(math.inf)))} <= {"nonfinite"}
