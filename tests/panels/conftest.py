"""A folder of logs such as TensorBoard is started on: real runs, a resumed one, and one with hostile names."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from traindiag.alerts.alert import Alert, Remedy
from traindiag.panels.sinks import FileSink
from traindiag.panels.tensorboard import TensorBoardPanels
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame, Reading
from traindiag.record.run_info import RunInfo

HOSTILE = "<img src=x onerror=document.title='pwned'>"
ROOT = Path(__file__).parents[2]

TRAIN = """
import sys
from pathlib import Path
from traindiag.demo.run import HEALTHY_LR, UNSTABLE_LR, Settings, train
from traindiag.lightning import TrainingDiagnostics

for name, lr in (("unstable", UNSTABLE_LR), ("healthy", HEALTHY_LR)):
    settings = Settings(lr=lr, steps=44, layers=2, width=32, batch=4, context=64)
    train(settings, [TrainingDiagnostics(every_n_steps=4, terminal=False)], Path(sys.argv[1]) / name)
"""

ADAM = Cells.along("optimizer", ["adam"])


def grid(layers: int, heads: int, layer: str = "blocks.{}.attention") -> Cells:
    return Cells(("layer", "head"), tuple((layer.format(i), j) for i in range(layers) for j in range(heads)))


def write_run(
    folder: Path,
    run: str,
    steps: Sequence[int],
    *,
    segment: int = 0,
    cells: Cells | None = None,
    scale: float = 1.0,
    alerts: Sequence[Alert] = (),
    every: int = 10,
    signals: Sequence[str] = ("attention/logit_range", "attention/entropy"),
) -> None:
    """Writes one job of a run: loss at every step, attention at samples; NaN and infinity where they may be."""
    places = grid(3, 4) if cells is None else cells
    info = RunInfo(run_id=run, length=500)
    panels = TensorBoardPanels(FileSink(folder), run, segment)
    panels.start(info, steps[0])
    panels.coverage([Coverage("attention", "exact", tuple(dict.fromkeys(str(c[0]) for c in places.coordinates)))], 0)
    for step in steps:
        value = np.array([scale * (3 - step / 1000)], np.float32)
        reading = Reading(BY_NAME["loss/value"], ADAM, value, np.ones(1, bool))
        panels.frame(Frame(step, "fast", {"loss/value": reading}, info, time=1e9 + step, segment=segment))
        if step % every == 0:
            values = np.float32(scale) * (1 + step + np.arange(len(places), dtype=np.float32))
            if step >= 80:
                values[:2] = math.nan, math.inf
            seen = np.ones(len(places), bool)
            seen[-1] = step != 50
            readings = {n: Reading(BY_NAME[n], places, values, seen) for n in signals}
            panels.frame(Frame(step, "slow", readings, info, time=1e9 + step, segment=segment))
        panels.alerts([a for a in alerts if a.step == step], step)
    panels.close()


def hostile_alert(step: int, run: str = "bad") -> Alert:
    return Alert(
        f"e{step}", "opened", HOSTILE, run, 0, step, 1e9, None, "critical", "slow", "attention",
        "attention/logit_range", f"{HOSTILE} head 1", math.inf, 1e3, "threshold",
        title=HOSTILE, evidence=HOSTILE, cause=HOSTILE,
        remedies=(Remedy(HOSTILE, {HOSTILE: HOSTILE}, source=HOSTILE),),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tab_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    # by itself: where any function in the process is compiled, losses outside of modules are not looked at, and the
    # tests before this one compile some
    subprocess.run([sys.executable, "-W", "ignore", "-c", TRAIN, root], cwd=ROOT, check=True, capture_output=True)
    write_run(root / "resumed", "again", range(100))
    write_run(root / "resumed on", "again", range(60, 160), segment=1, scale=0.5)
    write_run(root / HOSTILE, "bad", range(100), cells=grid(2, 3, HOSTILE + "{}"), alerts=[hostile_alert(90)])
    return root
