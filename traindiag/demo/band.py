"""When does a loss leave the company of healthy runs? Decided on the loss alone, with no signal of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BAND_FILE = Path(__file__).with_name("band.json")


@dataclass(frozen=True, slots=True)
class Band:
    """What healthy runs of the demo's own model reached, measured once and stored with the package.

    Retraining five healthy runs would take longer than the demo itself. ``benchmarks/demo_band.py`` writes the file.

    Args:
        layers: Shape of the model that was trained.
        width: As above.
        steps: Length of the runs.
        batch: Windows a step.
        context: Bytes in a window.
        lr: Peak learning rate of the runs.
        seeds: One run each.
        window: Steps that the smoothing averages over.
        margin: Distance above the worst healthy run, in nats, that counts as outside.
        upper: Worst smoothed loss of the healthy runs, ``[steps]``, nats per byte.
        validation: Validation loss at the end, one a seed, nats per byte.
        measured: Machine, versions and date.
    """

    layers: int
    width: int
    steps: int
    batch: int
    context: int
    lr: float
    seeds: tuple[int, ...]
    window: int
    margin: float
    upper: tuple[float, ...]
    validation: tuple[float, ...]
    measured: dict[str, str]

    def save(self, path: Path = BAND_FILE) -> None:
        """Writes what :meth:`load` reads."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path = BAND_FILE) -> Band:
        """The band that ships with the package."""
        data = json.loads(path.read_text())
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)

    def onset(self, losses: Sequence[float]) -> int | None:
        """Step at which a run of this length left the band for good, None if it ended inside."""
        return onset(losses, self.upper, window=self.window, margin=self.margin)


def smooth(losses: Sequence[float], window: int) -> NDArray[np.float64]:
    """Mean over the ``window`` nearest steps; fewer at both ends.

    The window is centred: a trailing one would put the onset half a window late and flatter every lead.

    Args:
        losses: One a step.
        window: Odd number of steps.

    Example:
        >>> smooth([3.0, 0.0, 3.0, 6.0], window=3).tolist()
        [1.5, 2.0, 3.0, 4.5]
    """
    if window < 1 or not window % 2:
        raise ValueError(f"window must be odd and positive, got {window}")
    kernel = np.ones(window)
    count = np.convolve(np.ones(len(losses)), kernel)
    edge = window // 2
    total = np.convolve(np.asarray(losses, np.float64), kernel)
    return (total / count)[edge : edge + len(losses)]


def onset(losses: Sequence[float], upper: Sequence[float], *, window: int, margin: float) -> int | None:
    """First step from which the smoothed loss stays more than ``margin`` above ``upper`` until the end.

    Args:
        losses: Training loss, one a step, nats.
        upper: Worst smoothed loss of healthy runs, one a step, nats.
        window: Steps of the smoothing, odd.
        margin: In nats.

    Returns:
        The step, or None where the run ends inside the band.

    Example:
        >>> onset([1, 9, 1, 2, 2], upper=[1, 1, 1, 1, 1], window=1, margin=0.5)
        3
        >>> onset([1, 9, 1, 2, 1], upper=[1, 1, 1, 1, 1], window=1, margin=0.5) is None
        True
    """
    if len(losses) != len(upper):
        raise ValueError(f"expected one loss for each of the {len(upper)} steps of the band, got {len(losses)}")
    inside = smooth(losses, window) <= np.asarray(upper) + margin  # a NaN is not inside
    last = np.flatnonzero(inside)
    step = int(last[-1]) + 1 if last.size else 0
    return step if step < len(losses) else None
