"""KillLossSpike raises where there is more than one loss; where they are summed, a large one hides a small one."""

from __future__ import annotations

from tests.field_bugs.pack import rule
from tests.rules.frames import frame, reading
from tests.rules.series import noise
from traindiag.record.cells import Cells


def test_each_is_judged_by_its_own_past() -> None:
    values = noise("independent", 200, 2, seed=1, sigma=0.05)
    values[:, 0] *= 1e4
    values[150, 1] *= 5
    judge, cells = rule("loss/spike"), Cells.along("optimizer", ["generator", "critic"])
    said = [v for t in range(200) for v in judge.update(frame(t, reading(values[t], "loss/value", cells)))]
    assert [(v.step, str(v.cell), v.others) for v in said if v.active] == [(150, "critic", 0)]
