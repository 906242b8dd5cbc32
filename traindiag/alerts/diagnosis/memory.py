"""What is remembered of a run, so that a failure can be told with what was there before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame, Reading
from traindiag.rules.rule import Verdict

STEPS = 32
"""Steps of loss and gradient norm that a bundle shows: a spike's lead is 1 to 8 of them, the others are the level."""

MATERIAL = 0.1
"""Share of the first loss by which the loss has to rise to count. Where little is left of it, losses of single
batches differ a hundredfold: without this 8 of 155 healthy small runs (79,000 steps) had a warning made of a jump
below a tenth, with it none."""

BATCHES = 8
"""Steps whose batches are remembered by name."""

TENSORS = 8
"""Tensors that a bundle names, those with the largest share first."""

_SERIES = ("loss/value", "gradient/norm", "gradient/norm_applied")
_TENSOR = "gradient/parameter_norm"
_RMS_T = ("optimizer/rms_t", "optimizer/sentinel_rms_t")
_JUMPS = ("spike", "shift")


@dataclass(frozen=True, slots=True)
class Level:
    """One signal at one step in a few numbers, whatever the number of its cells; what is not finite is left out.

    Args:
        step: When.
        low: Smallest value.
        low_at: Its cell.
        middle: Median over cells.
        high: Largest value.
        high_at: Its cell.
    """

    step: int
    low: float
    low_at: str
    middle: float
    high: float
    high_at: str

    @classmethod
    def of(cls, step: int, reading: Reading) -> Level | None:
        """None where nothing finite was seen.

        Example:
            >>> Level.of(7, Reading.scalar(BY_NAME["loss/value"], 2.5)).high
            2.5
        """
        there = np.flatnonzero(reading.seen & np.isfinite(reading.values))
        if not there.size:
            return None
        values = reading.values[there]
        low, high = there[np.argmin(values)], there[np.argmax(values)]
        numbers = float(reading.values[low]), float(np.median(values)), float(reading.values[high])
        labels = reading.cells.label(int(low)), reading.cells.label(int(high))
        return cls(step, numbers[0], labels[0], numbers[1], numbers[2], labels[1])


_Sight = tuple[int, Reading] | Level


class Memory:
    """The latest sight of every signal, the latest healthy one, the first, and one from earlier in the run.

    Nothing is computed before it is asked for: a frame costs a few dictionary entries. Checkpoints hold
    :class:`Level` s, so whatever is told of another frame than the one at hand may use nothing finer; the gradient
    norms of single tensors are the exception.

    Example:
        >>> from traindiag.record.run_info import RunInfo
        >>> memory = Memory()
        >>> for step, loss in enumerate([2.0, 1.5]):
        ...     reading = Reading.scalar(BY_NAME["loss/value"], loss)
        ...     memory.take(Frame(step, "fast", {"loss/value": reading}, RunInfo()), [])
        >>> memory.first("loss/value").high, memory.now("loss/value").high
        (2.0, 1.5)
    """

    def __init__(self) -> None:
        self._now: dict[str, _Sight] = {}
        self._healthy: dict[str, _Sight] = {}
        self._first: dict[str, _Sight] = {}
        self._anchor: dict[str, _Sight] = {}
        self._earlier: dict[str, _Sight] = {}
        self._recent: deque[tuple[int, tuple[Reading | float | None, ...]]] = deque(maxlen=STEPS)
        self._batches: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=BATCHES)

    def take(self, frame: Frame, verdicts: Sequence[Verdict]) -> None:
        """Remembers a frame.

        Args:
            frame: The frame.
            verdicts: What rules say about it: a signal that is under an active verdict is not healthy, and in a
                step in which one of them jumps neither are the loss, gradients and second moments as a whole.
        """
        active = [v for v in verdicts if v.active]
        sick = {v.signal for v in active}
        broken = any(v.kind == "nonfinite" for v in active)
        if broken or any(v.signal in _RMS_T or (v.kind in _JUMPS and _is_fast(v.signal)) for v in active):
            sick |= {name for name in frame.readings if _is_fast(name)}
        step = frame.step
        for name, reading in frame.readings.items():
            sight = (step, reading)
            self._now[name] = sight
            if name not in sick and not (broken and not np.isfinite(reading.values[reading.seen]).all()):
                self._healthy[name] = sight
            anchor = self._anchor.get(name)
            if anchor is None:
                self._first[name] = self._anchor[name] = sight
            elif step > 2 * _step(anchor):
                self._earlier[name], self._anchor[name] = anchor, sight
        if frame.lane == "fast":
            self._recent.append((step, tuple(frame.readings.get(name) for name in _SERIES)))
            if frame.batches:
                self._batches.append((step, frame.batches))

    def now(self, signal: str) -> Level | None:
        """The latest sight of a signal."""
        return _level(self._now.get(signal))

    def healthy(self, signal: str) -> Level | None:
        """The latest sight of it at which no rule found fault with it."""
        return _level(self._healthy.get(signal))

    def first(self, signal: str) -> Level | None:
        """The first sight of it in this run."""
        return _level(self._first.get(signal))

    def earlier(self, signal: str) -> Level | None:
        """A sight of it from a quarter to a half of the way to now; None in the first steps."""
        return _level(self._earlier.get(signal))

    def rose(self, loss: float) -> bool:
        """Whether a loss is a material rise over the last healthy one; where none is known it is."""
        first, healthy = self.first("loss/value"), self.healthy("loss/value")
        if first is None or healthy is None or not first.high > 0:
            return True
        return loss - healthy.high >= MATERIAL * first.high

    def batches(self, step: int) -> tuple[str, ...]:
        """What the batches of a recent step were called."""
        return next((names for at, names in self._batches if at == step), ())

    def bundle(self, *, tensors: bool) -> dict[str, Any]:
        """What led to this moment, as plain data: the last steps and, if asked for, which tensors jumped and what the
        last batches were called.

        ``tensors`` are ordered by ``share`` of the growth of the squared norm since ``before``, the last healthy
        step; those that are not finite come first, in forward order and without a share.
        """
        rows = list(self._recent)
        found: dict[str, Any] = {"steps": [step for step, _ in rows]} if rows else {}
        for i, name in enumerate(_SERIES):
            values = [_worst(row[i]) for _, row in rows]
            if any(v is not None for v in values):
                found[name] = values
        if tensors and (ranked := self._ranked()):
            found["tensors"] = ranked
        if tensors and self._batches:
            found["batches"] = {str(step): list(names) for step, names in self._batches}
        return found

    def share(self) -> tuple[str, float] | None:
        """The tensor with the largest part of the growth of the squared gradient norm, and that part."""
        ranked = self._ranked()
        return (ranked[0]["parameter"], ranked[0]["share"]) if ranked and ranked[0]["share"] is not None else None

    def _ranked(self) -> list[dict[str, Any]]:
        now, before = self._now.get(_TENSOR), self._healthy.get(_TENSOR)
        if now is None or isinstance(now, Level):
            return []
        step, reading = now
        known: dict[Any, float] = {}
        if before is not None and not isinstance(before, Level) and before[0] < step:
            known = dict(zip(before[1].cells.coordinates, before[1].values.astype(np.float64)))
        values = reading.values.astype(np.float64)
        old = np.array([known.get(at, np.nan) for at in reading.cells.coordinates])
        bad = np.flatnonzero(reading.seen & ~np.isfinite(values))
        grown = np.where(reading.seen & np.isfinite(values), values**2 - np.nan_to_num(old) ** 2, 0.0).clip(min=0.0)
        total = float(grown.sum())
        order = [*bad, *(i for i in np.argsort(-grown, kind="stable") if grown[i] > 0)][:TENSORS]
        return [
            {
                "parameter": reading.cells.label(int(i)),
                "share": None if bad.size else float(grown[i] / total),
                "now": float(values[i]),
                "before": None if np.isnan(old[i]) else float(old[i]),
            }
            for i in order
            if not bad.size or i in bad
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        kept = {"now": self._now, "healthy": self._healthy, "first": self._first}
        kept |= {"anchor": self._anchor, "earlier": self._earlier}
        state: dict[str, Any] = {
            slot: {name: list(astuple(level)) for name, s in sights.items() if (level := _level(s)) is not None}
            for slot, sights in kept.items()
        }
        state["recent"] = [[step, [_worst(v) for v in row]] for step, row in self._recent]
        state["batches"] = [[step, list(names)] for step, names in self._batches]
        state["tensors"] = [_plain(self._now.get(_TENSOR)), _plain(self._healthy.get(_TENSOR))]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; an empty state begins anew."""
        for slot in ("now", "healthy", "first", "anchor", "earlier"):
            levels = {name: Level(*values) for name, values in state.get(slot, {}).items()}
            setattr(self, f"_{slot}", levels)
        self._recent.clear()
        self._recent.extend((int(step), tuple(row)) for step, row in state.get("recent", ()))
        self._batches.clear()
        self._batches.extend((int(step), tuple(names)) for step, names in state.get("batches", ()))
        for sights, plain in zip((self._now, self._healthy), state.get("tensors", ())):
            if plain is not None:
                sights[_TENSOR] = _sight(plain)


def _is_fast(name: str) -> bool:
    return name.startswith(("gradient/", "loss/")) or name in _RMS_T


def _step(sight: _Sight) -> int:
    return sight.step if isinstance(sight, Level) else sight[0]


def _level(sight: _Sight | None) -> Level | None:
    return sight if sight is None or isinstance(sight, Level) else Level.of(*sight)


def _worst(value: Reading | float | None) -> float | None:
    if not isinstance(value, Reading):
        return value
    at = value.worst()
    return None if at is None else float(value.values[at])


def _plain(sight: _Sight | None) -> dict[str, Any] | None:
    if sight is None or isinstance(sight, Level):
        return None
    step, reading = sight
    return {
        "step": step,
        "axes": list(reading.cells.axes),
        "coordinates": [list(c) for c in reading.cells.coordinates],
        "values": reading.values.tolist(),
        "seen": reading.seen.tolist(),
    }


def _sight(plain: Mapping[str, Any]) -> tuple[int, Reading]:
    cells = Cells(tuple(plain["axes"]), tuple(tuple(c) for c in plain["coordinates"]))
    values, seen = np.array(plain["values"], np.float32), np.array(plain["seen"], np.bool_)
    return int(plain["step"]), Reading(BY_NAME[_TENSOR], cells, values, seen)
