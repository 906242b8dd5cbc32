"""Signs of lost plasticity, module by module: each may be wrong by itself, so they are read together."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from traindiag.record.frame import Frame
from traindiag.rules.wording import number

SETTLED = 1000
"""Updates after which dead and dormant units and ranks get their baseline: in the first thousand the data shape them
(measured on DQN: 28 % to 48 % of 0.1-dormant units, srank 128 to 45, in runs that go on to learn)."""

ACTIVE_LEFT = 0.6
"""Share of the first fraction of active units below which too little is left. Ours: in runs that learn it stays above
0.69, with eight updates a step."""

DORMANT_RISE = 0.15
"""Rise of the share of dormant or dead units over its baseline that counts. Ours; the level depends on the inputs."""

RANK_LEFT = 0.5
"""Share of its baseline below which a rank has collapsed. Ours; arXiv 2405.00662 section 3 finds collapse in PPO
where ranks have fallen to a few."""

NORM_GROWN = 10.0
"""Growth of the weight norm that counts beside another sign. Measured: 15 times in a run that learns well."""

UNTRAINABLE = 1.5
"""Loss on random targets against that of the first weights. Ours; 1 is no loss of plasticity by definition."""

PERSISTENCE = 3
"""Looks in a row that must show a sign; the training of copies is rare, and one is enough."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What one kind of signal says of a module.

    Args:
        kind: Signs of one kind are one witness: ``activity``, ``dormancy``, ``rank``, ``norm``, ``fit`` or
            ``trainability``.
        signal: Name of the signal.
        value: Its value at the worst layer.
        limit: What it is held against.
        words: Both in words.
    """

    kind: str
    signal: str
    value: float
    limit: float
    words: str


class PlasticityPanel:
    """Follows all signs of all modules from look to look.

    Layers of a module speak through the worst of them, each against its own baseline.
    """

    signals = (
        "plasticity/fau_pooled",
        "plasticity/dead",
        "plasticity/dormant_025",
        "plasticity/srank_99",
        "plasticity/feature_rank",
        "plasticity/weight_norm_ratio",
        "plasticity/explained_variance",
        "plasticity/trainability",
        "plasticity/updates",
    )

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._streaks: dict[str, int] = {}
        self._held: dict[str, Sign] = {}

    def look(self, frame: Frame) -> dict[str, list[Sign]]:
        """Takes a frame; the signs that every module in it shows now, each kind once."""
        updates = {place[0]: value for place, value in finite_cells(frame, "plasticity/updates")}
        found: dict[str, dict[str, Sign]] = {module: {} for module in updates}
        for signal in self.signals[:-1]:
            worst: dict[str, Sign] = {}
            for place, value in finite_cells(frame, signal):
                sign = self._sign(signal, place, value, updates.get(place[0], 0.0))
                if sign is not None:
                    worst.setdefault(place[0], sign)
            seen = _seen(frame, signal)
            for module in updates:
                sign = self._lasting(signal, module, worst.get(module), seen=module in seen)
                if sign is not None:
                    found[module].setdefault(sign.kind, sign)
        return {module: list(signs.values()) for module, signs in found.items()}

    def first(self, signal: str, place: Sequence[str], value: float) -> float:
        """The first value of a cell."""
        return self._first.setdefault("|".join((signal, *place)), value)

    def _settled(self, signal: str, place: Sequence[str], value: float, updates: float) -> float | None:
        """The first value after :data:`SETTLED` updates; None before there is one.

        One look is enough, because states stay the same, and where units are lost fast a later one is no baseline.
        """
        return None if updates < SETTLED else self.first(signal, place, value)

    def _sign(self, signal: str, place: Sequence[str], value: float, updates: float) -> Sign | None:
        where, shown = (f" at {place[1]}" if len(place) > 1 else ""), number(value)

        def sign(kind: str, bad: bool, limit: float, against: str) -> Sign | None:
            words = f"{signal} is {shown}{where}, {against}"
            return Sign(kind, signal, value, limit, words) if bad else None

        if signal == "plasticity/fau_pooled":
            first = self.first(signal, place, value)
            return sign("activity", value < ACTIVE_LEFT * first, ACTIVE_LEFT * first, f"{number(first)} at first")
        if signal == "plasticity/weight_norm_ratio":
            return sign("norm", value > NORM_GROWN, NORM_GROWN, "1 at first")
        if signal == "plasticity/explained_variance":
            return sign("fit", updates >= SETTLED and value < 0, 0.0, "worse than a constant")
        if signal == "plasticity/trainability":
            return sign("trainability", value > UNTRAINABLE, UNTRAINABLE, "1 for its first weights")
        base = self._settled(signal, place, value, updates)
        if base is None:
            return None
        against = f"{number(base)} once settled"
        if signal in ("plasticity/dead", "plasticity/dormant_025"):
            kind = "activity" if signal == "plasticity/dead" else "dormancy"
            return sign(kind, value > base + DORMANT_RISE, base + DORMANT_RISE, against)
        return sign("rank", value < RANK_LEFT * base, RANK_LEFT * base, against)

    def _lasting(self, signal: str, module: str, sign: Sign | None, *, seen: bool) -> Sign | None:
        """The sign once it has lasted; a signal that this look does not show keeps what it said."""
        key = f"{signal}|{module}"
        if not seen:
            return self._held.get(key)
        self._streaks[key] = 0 if sign is None else self._streaks.get(key, 0) + 1
        needed = 1 if signal == "plasticity/trainability" else PERSISTENCE
        if sign is None or self._streaks[key] < needed:
            self._held.pop(key, None)
            return None
        self._held[key] = sign
        return sign

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": dict(self._first),
            "streaks": dict(self._streaks),
            "held": {k: [s.kind, s.signal, s.value, s.limit, s.words] for k, s in self._held.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first = dict(state["first"])
        self._streaks = dict(state["streaks"])
        self._held = {key: Sign(*values) for key, values in state["held"].items()}


def finite_cells(frame: Frame, signal: str) -> list[tuple[tuple[str, ...], float]]:
    """Finite values of a signal with their places."""
    reading = frame.readings.get(signal)
    if reading is None:
        return []
    there = np.flatnonzero(reading.seen & np.isfinite(reading.values))
    return [(tuple(map(str, reading.cells.coordinates[i])) or ("",), float(reading.values[i])) for i in there]


def _seen(frame: Frame, signal: str) -> set[str]:
    """Modules of which a signal was measured, NaN included."""
    reading = frame.readings.get(signal)
    if reading is None:
        return set()
    return {"".join(map(str, reading.cells.coordinates[i][:1])) for i in np.flatnonzero(reading.seen)}


class Stages:
    """What a fraction of active units does over its looks: ``falling``, ``recovering`` or on a ``plateau``.

    Means of two windows in a row are held against each other, in units of the first value.

    Args:
        window: Looks in a window.
        band: Change from one window to the next, as a share of the first value, below which nothing changes.

    Example:
        >>> stages = Stages(window=2, band=0.02)
        >>> [stages.take(v) for v in (0.5, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3)][-4:]
        ['falling', 'falling', 'falling', 'plateau']
    """

    def __init__(self, window: int, band: float) -> None:
        self.window, self.band = window, band
        self.first: float | None = None
        self.values: deque[float] = deque(maxlen=2 * window)

    def take(self, value: float) -> str | None:
        """The stage after one more look; None while two windows are not full."""
        self.first = value if self.first is None else self.first
        self.values.append(value)
        if len(self.values) < 2 * self.window or not self.first:
            return None
        every = list(self.values)
        change = (sum(every[self.window :]) - sum(every[: self.window])) / self.window / self.first
        return "plateau" if abs(change) <= self.band else "recovering" if change > 0 else "falling"

    def level(self) -> float | None:
        """Mean of the last window against the first value; None while it is not full."""
        if len(self.values) < self.window or not self.first:
            return None
        return sum(list(self.values)[-self.window :]) / self.window / self.first

    def rises(self) -> bool:
        """Whether the last look lies above the lowest of its window already."""
        if len(self.values) < self.window or not self.first:
            return False
        recent = list(self.values)[-self.window :]
        return recent[-1] - min(recent) > self.band * self.first

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = state["first"]
        self.values.clear()
        self.values.extend(state["values"])
