"""Non-finite numbers are dropped on the way to the record, so that a broken gradient looks like a sparse one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.field_bugs.loop import gpt, train
from traindiag.record.log import read_log

BROKEN = "blocks.1.mlp.0.weight"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_it_stands_in_history_and_log_at_its_own_cell_only(bad: float, tmp_path: Path) -> None:
    def spoil(step: int, model: nn.Module) -> None:
        if step == 1:
            model.get_parameter(BROKEN).grad.view(-1)[5] = bad

    diagnostics = train(gpt(), before_gradients=spoil, log_dir=tmp_path)
    for series in (
        diagnostics.history["gradient/parameter_norm"],
        read_log(tmp_path).history["gradient/parameter_norm"],
    ):
        labels = [str(c.coordinates[1]) for c in series.cells]
        row = series.steps.tolist().index(1)
        wrong = {labels[i] for i in np.flatnonzero(~np.isfinite(series.values[row]))}
        assert wrong == {BROKEN}
        assert series.seen[row].all()
    total = diagnostics.history["gradient/norm"]
    assert not np.isfinite(total.values[1, 0]) and total.seen[1, 0]
    assert any(a.rule == "nonfinite" and a.step == 1 for a in diagnostics.alerts)
