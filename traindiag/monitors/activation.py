"""Size, outliers, dead and broken values of what blocks return, and how the size grows with depth."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from traindiag.capture.blocks import Stack, block_stacks, layers_with_parameters
from traindiag.capture.taps import ModuleCall, ModuleTap, Tap
from traindiag.capture.watched import Watched
from traindiag.functional.activation import ActivationStatistics, activation_statistics
from traindiag.monitors.monitor import Monitor
from traindiag.record.catalogue import BY_NAME, near
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.transfer.states import Group, Reduced

_SUMS = tuple(name for name in ActivationStatistics._fields if name != "max_abs")
_SIGNALS = {
    name: BY_NAME[f"activation/{name}"]
    for name in ("rms", "max", "kurtosis", "zero_fraction", "nonfinite", "growth_exponent")
}

MAX_LAYERS = 32
"""Layers looked at in a model without blocks."""

Floats = NDArray[np.float64]


class ActivationMonitor(Monitor):
    """``activation/rms``, ``max``, ``kurtosis``, ``zero_fraction``, ``nonfinite`` and ``growth_exponent``.

    Looked at is what the blocks return that a model repeats, or its layers where it has no blocks. RMS and maximum
    are of all values, the others of evenly spaced rows. The kurtosis of several calls or ranks is their mean weighted
    by their sums of squares, which is never below that of all together.

    One with settings of its own takes the place of the default one: ``monitors=[ActivationMonitor(["*.mlp"])]``.

    Args:
        modules: Globs over names of watched modules whose outputs are looked at too, such as ``"*.mlp"``.
        rows: Rows of an activation that are looked at one by one, at most.

    Raises:
        ValueError: If ``rows`` is below 1; in ``prepare``, for a pattern that matches no watched module.
        TypeError: If ``modules`` is one string.
    """

    name = "activation"
    family = "activation"
    lane = "slow"
    signals = tuple(_SIGNALS.values())

    def __init__(self, modules: Sequence[str] = (), *, rows: int = 256) -> None:
        if isinstance(modules, str):
            raise TypeError(f"modules is a list of names or globs, got the string {modules!r}")
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.modules = tuple(modules)
        self.rows = rows
        self._stacks: tuple[Stack, ...] = ()
        self._places: tuple[str, ...] = ()
        self._layers: dict[str, ActivationStatistics] = {}
        self._cells = Cells.along("layer", ())

    def prepare(self, watched: Watched) -> None:
        self._stacks = block_stacks(watched)
        places = [block for stack in self._stacks for block in stack.blocks]
        places = places or list(layers_with_parameters(watched, MAX_LAYERS))
        for pattern in self.modules:
            found = fnmatch.filter(watched.modules, pattern)
            if not found:
                raise ValueError(
                    f"modules: {pattern!r} matches no module that is being trained.{near(pattern, watched.modules)}"
                )
            places += found
        self._places = tuple(dict.fromkeys(places))

    def taps(self) -> Sequence[Tap]:
        return (ModuleTap(self._places, self._observe),)

    def _observe(self, call: ModuleCall) -> None:
        if not call.output.numel():
            return
        new = activation_statistics(call.output, rows=self.rows)
        known = self._layers.get(call.layer)
        self._layers[call.layer] = new if known is None else _joined(known, new)

    def collect(self) -> Sequence[Group]:
        layers, self._layers = self._layers, {}
        if not layers:
            return ()
        if tuple(layers) != tuple(c[0] for c in self._cells.coordinates):
            self._cells = Cells.along("layer", layers)
        device = next(iter(layers.values())).max_abs.device

        def states(name: str) -> Tensor:
            return torch.stack(
                [getattr(s, name).to(device, torch.float32, non_blocking=True) for s in layers.values()]
            )

        return (
            Group(
                "layers",
                self._cells,
                sums={name: states(name) for name in _SUMS},
                maxima={"max_abs": states("max_abs")},
            ),
        )

    def readings(self, states: Mapping[str, Reduced]) -> Sequence[Reading]:
        layers = states.get("layers")
        if layers is None:
            return ()
        cells, seen, sums = layers.cells, layers.seen, layers.sums
        power = sums["sampled_square_sum"]
        rms = np.sqrt(_ratio(sums["square_sum"], sums["values"]))
        # Where everything is zero no feature stands out; NaN is not zero.
        lives = seen & (power != 0)
        return (
            Reading.masked(_SIGNALS["rms"], cells, rms, seen),
            Reading.masked(_SIGNALS["max"], cells, layers.maxima["max_abs"], seen, layers.ranks["max_abs"]),
            Reading.masked(_SIGNALS["kurtosis"], cells, _ratio(sums["weighted_kurtosis"], power), lives),
            Reading.masked(_SIGNALS["zero_fraction"], cells, _ratio(sums["zeros"], sums["sampled"]), seen),
            Reading.masked(_SIGNALS["nonfinite"], cells, sums["nonfinite"], seen),
            *self._growth(cells, rms, seen),
        )

    def _growth(self, cells: Cells, rms: Floats, seen: NDArray[np.bool_]) -> Sequence[Reading]:
        """From the first block to the last; none where either was not seen or is zero everywhere."""
        found: dict[str, float] = {}
        for stack in self._stacks:
            ends = [cells.position.get((block,)) for block in (stack.blocks[0], stack.blocks[-1])]
            first, last = (None if at is None or not seen[at] or rms[at] == 0 else rms[at] for at in ends)
            if len(stack.blocks) > 1 and first is not None and last is not None:
                with np.errstate(invalid="ignore"):  # infinity less infinity is NaN
                    found[stack.name] = float(np.log(last) - np.log(first)) / len(stack.blocks)
        if not found:
            return ()
        values = np.array(list(found.values()))
        return (
            Reading.masked(
                _SIGNALS["growth_exponent"], Cells.along("layer", found), values, np.ones(len(found), np.bool_)
            ),
        )


def _joined(a: ActivationStatistics, b: ActivationStatistics) -> ActivationStatistics:
    """Of two calls."""
    sums = {name: getattr(a, name) + getattr(b, name) for name in _SUMS}
    return ActivationStatistics(**sums, max_abs=torch.maximum(a.max_abs, b.max_abs))


def _ratio(total: Floats, count: Floats) -> Floats:
    """NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore"):
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count != 0)
