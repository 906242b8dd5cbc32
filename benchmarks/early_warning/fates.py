"""Fate and onset of every run, from its losses and those of its control, and from nothing else.

What decides is in ``protocol.toml``. What is read are the loss files of a folder, one a run, each with the losses of
a run, step by step, and whose control, reference and cure it is. Neither torch nor traindiag is imported here, so no
signal can enter.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

Floats = NDArray[np.float64]

PROTOCOL = Path(__file__).with_name("protocol.toml")
FAILED = ("diverged", "stuck", "degraded", "spiked")

_HUGE = 1e30  # stands for what is not finite, so that differences stay numbers


def protocol() -> dict[str, Any]:
    """Every constant of the benchmark."""
    return tomllib.loads(PROTOCOL.read_text())


@dataclass(frozen=True)
class Losses:
    """What one loss file holds.

    Args:
        name: Name of the run.
        losses: Cross-entropy of the batch of each step, before its update; fewer than ``steps`` where the run was
            ended because it had become non-finite.
        steps: Horizon.
        warmup: Steps until the learning rate has reached its peak.
        control: Name of the run without the fault, on the same initialisation and batches; its own for a control.
        reference: Name that the controls of all seeds share.
        kind: Name of the fault, ``"none"`` for a run that is expected to be well.
        cure: Name of the remedy where this is a cured twin, with ``cure_of``, the name of the run that it cures.
        cure_of: See ``cure``.
        control_is: Name of the remedy that leads from this run to its control.
        injected_at: Step of an injected fault.
        split: ``tuning`` or ``reporting``.
        row: Row of the published table.
        configuration: Name that runs share that differ in their seed only.
        recipe: Digest of how it was trained.
    """

    name: str
    losses: Floats
    steps: int
    warmup: int
    control: str
    reference: str
    kind: str = "none"
    cure: str | None = None
    cure_of: str | None = None
    control_is: str | None = None
    injected_at: int | None = None
    split: str = ""
    row: str = ""
    configuration: str = ""
    recipe: str = ""

    @classmethod
    def read(cls, path: Path) -> Losses:
        """Reads a loss file; a loss that is not finite stands as null there."""
        data = json.loads(path.read_text())
        values = [math.inf if x is None else x for x in data.pop("losses")]
        return cls(losses=np.array(values, np.float64), **data)

    def whole(self) -> Floats:
        """Losses of all ``steps``; what is not finite, or was not trained any more, is one huge number."""
        short = self.steps - len(self.losses)
        finite = np.where(np.isfinite(self.losses), self.losses, _HUGE)
        return np.concatenate([np.minimum(finite, _HUGE), np.full(short, _HUGE)])


@dataclass(frozen=True)
class Scale:
    """What the reference says a run of its kind can gain.

    Args:
        initial: Loss at initialisation, the mean over the seeds of the control.
        final: Loss over the last tenth, the mean over the seeds of the control.
        seeds: How many there are.
    """

    initial: float
    final: float
    seeds: int

    @property
    def drop(self) -> float:
        """D of the protocol: loss at initialisation less final loss."""
        return self.initial - self.final

    @classmethod
    def of(cls, controls: Iterable[Losses], tail: float) -> Scale:
        """The scale that the controls of all seeds give.

        Raises:
            ValueError: If a control is not finite, or nothing was learned.
        """
        runs = [(c.name, c.whole()) for c in controls]
        for name, losses in runs:
            if losses.max() >= _HUGE:
                raise ValueError(f"the control {name} has a loss that is not finite: it cannot be a control")
        scale = cls(
            initial=float(np.mean([losses[0] for _, losses in runs])),
            final=float(np.mean([losses[-_share(tail, len(losses)) :].mean() for _, losses in runs])),
            seeds=len(runs),
        )
        if scale.drop <= 0:
            raise ValueError(f"the controls {[name for name, _ in runs]} have learned nothing: {scale}")
        return scale


@dataclass(frozen=True)
class Fate:
    """What became of a run.

    Args:
        fate: ``diverged``, ``stuck``, ``degraded``, ``slow``, ``spiked``, ``grey`` or ``healthy``.
        tail_excess: E as a share of D.
        strict: First step of the failure by the strict definition; None for a run that did not fail.
        material: The same by the material definition.
    """

    fate: str
    tail_excess: float
    strict: int | None = None
    material: int | None = None

    @property
    def failed(self) -> bool:
        """Whether the run counts as one that a warning is wanted for."""
        return self.fate in FAILED


def running_median(values: Floats, window: int) -> Floats:
    """Median of ``window`` steps around each; at the ends, of those that there are.

    Example:
        >>> running_median(np.array([0.0, 0.0, 9.0, 0.0, 4.0]), 3).tolist()
        [0.0, 0.0, 0.0, 4.0, 2.0]
    """
    padded = np.pad(values, window // 2, constant_values=np.nan)
    return np.asarray(np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1))


def judge(losses: Floats, control: Floats, scale: Scale, rules: Mapping[str, float], cut: float) -> Fate:
    """Fate and onset of one run.

    Args:
        losses: One a step; what is not finite is huge.
        control: Those of the control on the same batches.
        scale: Of the reference.
        rules: ``[fate]`` of the protocol.
        cut: Share of D from which on a loss of quality is a failure.
    """
    steps, drop = len(losses), scale.drop
    window = _window(steps, rules)
    lasting = _share(rules["lasting"], steps)
    raw = losses - control
    smooth = running_median(losses, window)
    excess = running_median(raw, window)
    tail = float(excess[-_share(rules["tail"], steps) :].mean()) / drop

    learned = np.flatnonzero(smooth <= scale.initial - rules["covered"] * drop)
    # a run that never learned has nothing to rise from: all of its excess counts
    rise = (_rise(excess, int(learned[0])) if len(learned) else excess) / drop
    risen = _first_stretch(rise > cut, lasting)

    broken = _first(losses >= _HUGE)
    above = _first_stretch(smooth > max(scale.initial, float(losses[0])) + cut * drop, window)
    spike = _first_spike(losses, raw, smooth, window, cut * drop, int(rules["spike_steps"]))

    if broken is not None or above is not None:
        fate, material = "diverged", min(s for s in (risen, broken, above) if s is not None)
    elif not len(learned) and tail > cut:
        fate, material = "stuck", risen if risen is not None else _first(rise > cut)
    elif tail > cut:
        fate, material = ("slow", None) if risen is None else ("degraded", risen)
    elif spike is not None:
        fate, material = "spiked", spike
    else:
        fate, material = ("grey" if tail > rules["healthy"] else "healthy"), None
    if material is None:
        return Fate(fate, tail)
    strict = material if fate == "spiked" else _last_crossing(rise > rules["strict"], material)
    return Fate(fate, tail, strict, material)


def judge_all(runs: Mapping[str, Losses], constants: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``fates.json`` holds: one entry a run, by name.

    Raises:
        ValueError: If the control of a run is missing.
    """
    rules, cuts = constants["fate"], constants["fate"]["other_cuts"]
    families = {name: cure["family"] for name, cure in constants["cure"].items()}
    references = defaultdict(list)
    for run in runs.values():
        if run.control == run.name:
            references[run.reference].append(run)
    scales = {name: Scale.of(controls, rules["tail"]) for name, controls in references.items()}

    def against(run: Losses, other: str, cut: float) -> Fate:
        if other not in runs or run.reference not in scales:
            raise ValueError(f"{run.name} is compared with {other} of {run.reference}, which has not been run")
        return judge(run.whole(), runs[other].whole(), scales[run.reference], rules, cut)

    def fate_of(run: Losses, cut: float) -> Fate:
        if run.control == run.name:
            peers = [r.whole() for r in references[run.reference] if r is not run]
            return _as_control(run.whole(), peers, scales[run.reference], rules, cut)
        return against(run, run.control, cut)

    fates = {name: fate_of(run, rules["cut"]) for name, run in runs.items()}
    twins: dict[str, dict[str, Losses]] = defaultdict(dict)
    for run in runs.values():
        if run.cure is not None and run.cure_of is not None:
            twins[run.cure_of][run.cure] = run
        if run.control_is is not None:
            twins[run.name][run.control_is] = runs[run.control]
    return {
        name: {
            "fate": fates[name].fate,
            "tail_excess": _plain(fates[name].tail_excess),
            "strict": fates[name].strict,
            "material": fates[name].material,
            "clock": _clock(run, fates[name], rules),
            **{f"fate_at_{cut}": fate_of(run, cut).fate for cut in cuts},
            "drop": _plain(scales[run.reference].drop),
            "reference_seeds": scales[run.reference].seeds,
            "kind": run.kind,
            "split": run.split,
            "row": run.row,
            "configuration": run.configuration,
            "recipe": run.recipe,
            "control": run.control,
            "cure": run.cure,
            "cure_of": run.cure_of,
            "injected_at": run.injected_at,
            "steps": run.steps,
            **_cures(run, fates, twins[name], families, rules, against),
        }
        for name, run in sorted(runs.items())
    }


def _as_control(losses: Floats, peers: list[Floats], scale: Scale, rules: Mapping[str, float], cut: float) -> Fate:
    """A control has no control; the mean of those of the other seeds, on other batches, shows whether it failed."""
    if not peers:
        return Fate("healthy", 0.0)
    found = judge(losses, np.mean(peers, axis=0), scale, rules, cut)
    return found if found.failed and found.fate != "spiked" else Fate("healthy", found.tail_excess)


def _cures(
    run: Losses,
    fates: Mapping[str, Fate],
    twins: Mapping[str, Losses],
    families: Mapping[str, str],
    rules: Mapping[str, float],
    against: Any,
) -> dict[str, Any]:
    """What each cured twin came to, the onset seen from it, and the families that a right warning names."""
    fate = fates[run.name]
    if run.injected_at is not None:
        return {"families": ["injected"], "cures": {}}
    if not fate.failed:
        return {"families": [], "cures": {}}
    found: dict[str, Any] = {}
    for cure, twin in twins.items():
        cured = fates[twin.name]
        third = fate.fate != "spiked" and cured.tail_excess <= (1 - rules["cured"]) * fate.tail_excess
        works = cured.fate == "healthy" or (third and cured.fate != "diverged")
        onset = against(run, twin.name, rules["cut"]) if works else Fate("", math.nan)
        found[cure] = {
            "run": twin.name,
            "fate": cured.fate,
            "works": works,
            "strict": onset.strict,
            "material": onset.material,
        }
    working = [cure for cure, twin in found.items() if twin["works"]]
    named = {families[cure] for cure in working}
    others = sorted(named - {"lower_lr"})
    return {"families": others or (["optimizer"] if named else []), "cures": found}


def _clock(run: Losses, fate: Fate, rules: Mapping[str, float]) -> str | None:
    """Which of the three tables a failing run belongs to; None for one that did not fail."""
    if run.injected_at is not None:
        return "injected"
    if fate.material is None:
        return None
    late = fate.material >= max(run.warmup, rules["slow_after"] * run.steps)
    return "slow" if late and run.steps >= rules["slow_steps"] else "fast"


def _share(share: float, steps: int) -> int:
    return max(1, round(share * steps))


def _window(steps: int, rules: Mapping[str, float]) -> int:
    return max(int(rules["window_steps"]), _share(rules["window_share"], steps)) // 2 * 2 + 1


def _rise(excess: Floats, start: int) -> Floats:
    """Excess over its own smallest value since ``start``, 0 before; a run that only lags has none."""
    lag = np.maximum(excess[start:], 0)
    return np.concatenate([np.zeros(start), lag - np.minimum.accumulate(lag)])


def _first(holds: NDArray[np.bool_]) -> int | None:
    at = np.flatnonzero(holds)
    return int(at[0]) if len(at) else None


def _first_stretch(holds: NDArray[np.bool_], length: int) -> int | None:
    """First step of the first stretch of at least ``length`` steps."""
    if len(holds) < length:
        return None
    return _first(np.lib.stride_tricks.sliding_window_view(holds, length).all(axis=1))


def _last_crossing(above: NDArray[np.bool_], until: int) -> int:
    """Last step up to ``until`` at which ``above`` begins to hold; ``until`` where it does not hold there."""
    below = np.flatnonzero(~above[: until + 1])
    return min(until, int(below[-1]) + 1 if len(below) else 0)


def _first_spike(losses: Floats, raw: Floats, smooth: Floats, window: int, height: float, steps: int) -> int | None:
    """First step of the first window in which ``steps`` steps stand out.

    They do against the control, against the median excess of the window before, and against the best loss so far.
    """
    before = np.concatenate([np.zeros(window), raw])[:-1]
    recent = np.median(np.lib.stride_tricks.sliding_window_view(before, window), axis=1)
    best = np.concatenate([[np.inf], np.minimum.accumulate(smooth)[:-1]])
    out = np.flatnonzero((raw > height) & (raw - recent > height) & (losses - best > height / 2))
    near = np.flatnonzero(out[steps - 1 :] - out[: len(out) - steps + 1] < window)
    return int(out[near[0]]) if len(near) else None


def _plain(value: float) -> float | None:
    return None if abs(value) >= _HUGE / 1e6 else round(value, 4)


def read_folder(folder: Path) -> dict[str, Losses]:
    """Every finished run below ``folder``, by name."""
    return {run.name: run for run in map(Losses.read, sorted(folder.glob("*.json")))}
