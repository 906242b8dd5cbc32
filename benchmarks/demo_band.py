"""Measures the band of healthy runs that ``traindiag demo`` compares itself with, and stores it in the package.

Run it again when the demo's model, data or schedule changes: ``python benchmarks/demo_band.py``. It trains five
healthy seeds and takes a few minutes.
"""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version

import numpy as np

from traindiag.demo.band import BAND_FILE, Band, smooth
from traindiag.demo.run import HEALTHY_LR, Settings, train

SEEDS = (0, 1, 2, 3, 4)
WINDOW = 11
MARGIN = 0.12
"""Nats. A healthy seed left out of the band rises above the other four by up to 0.112 at some step."""


def left_out(curves: np.ndarray) -> list[float]:
    """How far each run rises above the worst of the others, nats: what the margin has to cover."""
    return [float((curve - np.delete(curves, i, 0).max(0)).max()) for i, curve in enumerate(curves)]


def main() -> None:
    """Trains, prints what the margin rests on, and writes the file."""
    runs = [train(Settings(lr=HEALTHY_LR, seed=seed)) for seed in SEEDS]
    curves = np.array([smooth(run.losses, WINDOW) for run in runs])
    print("excess of each run over the other four:", [round(x, 3) for x in left_out(curves)])
    s = runs[0].settings
    Band(
        layers=s.layers,
        width=s.width,
        steps=s.steps,
        batch=s.batch,
        context=s.context,
        lr=s.lr,
        seeds=SEEDS,
        window=WINDOW,
        margin=MARGIN,
        upper=tuple(round(float(x), 4) for x in curves.max(0)),
        validation=tuple(round(run.validation, 4) for run in runs),
        measured={
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "lightning", "numpy")},
        },
    ).save()
    print("wrote", BAND_FILE)


if __name__ == "__main__":
    main()
