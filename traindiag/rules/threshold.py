"""A limit on a signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.catalogue import BY_NAME, check_signal
from traindiag.record.frame import BoolArray, FloatArray, Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.alive import idle_members
from traindiag.rules.cell_table import CellTable, verdict_at
from traindiag.rules.learned import LOSS, LossLeft
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import more, number

RELEASE = 0.1
"""Share of a limit that a value must fall back by before the crossing counts as over, so that it does not flap."""

NEAR = 0.5
"""A first value above this share of the limit is a level that the run brought along: batches differ by about that."""

PATIENT_PERSISTENCE = 16
"""Who waits for so many values in a row may see them some steps late. So may who only takes notes."""


class Threshold(Rule):
    """Speaks while a signal is beyond a limit.

    A cell begins to fail at its ``persistence``-th crossing in a row and fails until it is back inside the limit by
    a tenth of it. Samples that do not see a cell leave its count alone. NaN is neither healthy nor a crossing: it
    leaves the count alone too and is :class:`~traindiag.rules.nonfinite.NonFinite`'s business. ``+inf`` is above
    every limit and ``-inf`` below every limit; on the other side they count as NaN does.

    An exact zero of a parameter is below nothing while it belongs to an expert, a head or the like that the step did
    not use: see :func:`~traindiag.rules.alive.idle_members`.

    With ``persistence`` 3 it says nothing of 400,000 healthy values around 1 (log-normal of sigma 0.35, independent
    or AR(0.9)) against a limit of 4 for half of the cells, or of 0.1 once they have been above 2.

    Args:
        signal: Name of the signal.
        above: Largest healthy value.
        below: Smallest healthy value.
        critical_above: Beyond this the severity is critical.
        critical_below: Likewise.
        persistence: Consecutive judged samples beyond the limit before it speaks.
        cooldown: Steps of rest that end the event; a crossing that comes back sooner belongs to it.
        where: Glob over a cell's label (``blocks.0.attn head 3``) or any one of its coordinates (``blocks.0.*``).
        severity: Severity of a crossing of ``above`` or ``below``.
        inherit: For runs that start from trained weights. A cell whose first value is already near or beyond
            ``above`` keeps that level as its own: it is told as info while it is beyond ``above``, and fails only
            when it has grown ``growth`` times.
        growth: See ``inherit``.
        share: Share of the cells seen, NaN left out, that must be beyond the limit in the same sample; otherwise none
            counts as beyond it. With 0.5 the median must be.
        fallen_from: A cell is held against ``below`` only once it has been seen above this, and finite.
        waits: A cell that its first sample does not see is left out until it has been inside the limit. So is the
            update ratio of weights that began at zero: their t-th update is about a t-th of them.
        left: Crossings count only while the loss is above this share of its first value: where all is learned,
            gradients are small and nothing is wrong. Without a loss they always count.
        name: Name of the rule, which must be unique; made of signal and limits where it is not given.

    Raises:
        ValueError: If there is no limit, a limit does not fit another, or the signal does not exist.

    Example:
        >>> from traindiag.record.frame import Frame, Reading
        >>> from traindiag.record.run_info import RunInfo
        >>> from traindiag.record.signal import Signal
        >>> rule = Threshold("reward/kl", above=10.0, persistence=2)
        >>> for step, value in enumerate([3.0, 20.0, 30.0]):
        ...     reading = Reading.scalar(Signal("reward/kl", (), "KL to the reference"), value)
        ...     verdicts = rule.update(Frame(step, "fast", {"reward/kl": reading}, RunInfo()))
        >>> verdicts[0].evidence
        'reward/kl is 30, above 10, for 2 samples'
    """

    def __init__(
        self,
        signal: str,
        *,
        above: float | None = None,
        below: float | None = None,
        critical_above: float | None = None,
        critical_below: float | None = None,
        persistence: int = 1,
        cooldown: int = COOLDOWN,
        where: str = "*",
        severity: Severity = "warning",
        inherit: bool = False,
        growth: float = 10.0,
        share: float = 0.0,
        fallen_from: float | None = None,
        waits: bool = False,
        left: float = 0.0,
        name: str | None = None,
    ) -> None:
        check_signal(signal)
        if above is None and below is None:
            raise ValueError(f"Threshold({signal!r}) needs a limit: above=, below= or both; got neither")
        arguments.above(
            -np.inf, above=above, below=below, critical_above=critical_above, critical_below=critical_below
        )
        arguments.at_least(1, persistence=persistence)
        arguments.at_least(0, cooldown=cooldown)
        arguments.above(1.0, growth=growth)
        arguments.severity(severity)
        arguments.share(share=share, left=left)
        if fallen_from is not None and (below is None or fallen_from <= below):
            raise ValueError(f"fallen_from must lie above below, got fallen_from={fallen_from} with below={below}")
        if above is not None and below is not None and below >= above:
            raise ValueError(f"below must be smaller than above, got below={below} and above={above}")
        if critical_above is not None and (above is None or critical_above <= above):
            raise ValueError(f"critical_above must lie beyond above, got {critical_above} with above={above}")
        if critical_below is not None and (below is None or critical_below >= below):
            raise ValueError(f"critical_below must lie beyond below, got {critical_below} with below={below}")
        if inherit and (above is None or above <= 0):
            raise ValueError(f"inherit=True measures growth, which needs above > 0; got above={above}")
        self.signal, self.signals = signal, (signal, LOSS) if left and signal != LOSS else (signal,)
        self._left = LossLeft(left) if left else None
        self.above, self.below = above, below
        self.critical_above, self.critical_below = critical_above, critical_below
        self.persistence, self.cooldown = persistence, cooldown
        self.where, self.severity = where, severity
        self.inherit, self.growth = inherit, growth
        self.share, self.fallen_from, self.waits = share, fallen_from, waits
        slow = signal in BY_NAME and BY_NAME[signal].lane != "fast"
        self.patient = severity == "info" or persistence >= PATIENT_PERSISTENCE or slow
        sides = [f"{word} {number(at)}" for word, at in (("above", above), ("below", below)) if at is not None]
        self.name = name or " ".join([signal, *sides, *(() if where == "*" else ("at", where))])
        # Python floats: numpy compares them as float32, as the values are, so that a logged 0.1 is not above 0.1.
        self._high, self._low = np.inf if above is None else above, -np.inf if below is None else below
        self._critical_high = np.inf if critical_above is None else critical_above
        self._critical_low = -np.inf if critical_below is None else critical_below
        self._leave_above = np.inf if above is None else above - RELEASE * abs(above)
        self._leave_below = -np.inf if below is None else below + RELEASE * abs(below)
        self._table = CellTable(
            where,
            count=0,
            active=False,
            met=False,
            held=False,
            limit=float(self._high),
            fell=False,
            known=False,
            waiting=False,
        )
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        if self._left is not None:
            self._left.follow(frame)
        reading = frame.readings.get(self.signal)
        if reading is None:
            return ()
        table = self._table
        values, seen = table.align(reading)
        if self.inherit:
            self._keep_inherited(values, seen)
        limit = table["limit"] if self.inherit else self._high
        low = values < self._low
        if self.fallen_from is not None:
            low &= table["fell"]
            table["fell"] |= seen & (values > self.fallen_from) & (values < np.inf)
        if self.waits:
            seen = seen & ~self._waiting(seen, np.isfinite(values) & (values <= limit) & ~low)
        crossing = seen & ((values > limit) | low)
        if crossing.any() and (idle := self._idle(values, seen)) is not None:
            seen, crossing = seen & ~idle, crossing & ~idle
        too_few = bool(self.share) and crossing.sum() < self.share * (seen & ~np.isnan(values)).sum()
        too_few = too_few or (self._left is not None and bool(crossing.any()) and not self._left.some())
        if too_few:
            crossing[:] = False
        count, active, held = table["count"], table["active"], table["held"]
        if not (self._open or crossing.any() or count.any() or (self.inherit and self._over_own(values, seen).any())):
            return ()
        judged = seen & (crossing | np.isfinite(values))
        np.copyto(count, np.where(crossing, count + 1, 0), where=judged)
        leave_above = table["limit"] * (1 - RELEASE) if self.inherit else self._leave_above
        active &= ~(judged & (too_few | ((values <= leave_above) & (values >= self._leave_below))))
        active |= crossing & (count >= self.persistence)
        if self.inherit:
            held &= ~(judged & (values <= self._leave_above))
            held |= judged & self._over_own(values, seen)
        return self._tell(frame, reading, values, judged)

    def _waiting(self, seen: BoolArray, inside: BoolArray) -> BoolArray:
        """Cells that were absent at first and have not been inside the limit since."""
        known, waiting = self._table["known"], self._table["waiting"]
        waiting |= ~known & ~seen
        known[:] = True
        waiting &= ~(seen & inside)
        return np.array(waiting, np.bool_)

    def _idle(self, values: FloatArray, seen: BoolArray) -> BoolArray | None:
        """Parameters that the step did not use; None where there is no such thing."""
        cells, zero = self._table.cells, seen & (values == 0)
        if cells is None or cells.axes[-1:] != ("parameter",) or not zero.any():
            return None
        return idle_members(cells, zero | ~seen)

    def _keep_inherited(self, values: FloatArray, seen: BoolArray) -> None:
        met = self._table["met"]
        if met.all():
            return
        first = seen & ~met & np.isfinite(values)
        near = first & (values > NEAR * self._high)
        np.copyto(self._table["limit"], self.growth * values.astype(np.float64), where=near)
        met |= first

    def _over_own(self, values: FloatArray, seen: BoolArray) -> BoolArray:
        """Cells whose inherited level is beyond the limit for all others."""
        over: BoolArray = seen & (self._table["limit"] > self._high) & (values > self._high)
        return over

    def _tell(self, frame: Frame, reading: Reading, values: FloatArray, judged: BoolArray) -> Sequence[Verdict]:
        table = self._table
        failing = table["active"]
        if not failing.any():
            failing = table["held"]
        if not failing.any():
            if not self._open or not judged.any():
                return ()
            self._open = False
            return (self._verdict(frame, reading, values, self._worst(values, judged), active=False),)
        self._open = True
        told = failing & judged
        if not told.any():  # a sample that saw none of the failing cells says nothing new
            return ()
        beyond = (values > np.maximum(table["limit"], self._critical_high)) | (values < self._critical_low)
        critical = beyond & told & table["active"]
        at = self._worst(values, critical if critical.any() else told)
        return (self._verdict(frame, reading, values, at, others=int(told.sum()) - 1, critical=bool(critical[at])),)

    def _is_high(self, value: float) -> bool:
        """Whether a value is to be held against ``above``."""
        if self.above is None or self.below is None:
            return self.above is not None
        return value > (self.above + self.below) / 2

    def _worst(self, values: FloatArray, among: BoolArray) -> int:
        at = np.flatnonzero(among)
        high, low = at[np.argmax(values[at])], at[np.argmin(values[at])]
        return int(high if self._is_high(float(values[high])) else low)

    def _verdict(
        self,
        frame: Frame,
        reading: Reading,
        values: FloatArray,
        at: int,
        *,
        active: bool = True,
        others: int = 0,
        critical: bool = False,
    ) -> Verdict:
        table, value = self._table, float(values[at])
        assert table.cells is not None
        high, own = self._is_high(value), float(table["limit"][at])
        if high:
            limit = max(own, self._critical_high) if critical else own
        else:
            limit = self._critical_low if critical else self._low
        severity: Severity = "critical" if critical else self.severity
        if not active:
            evidence = f"{self.signal} is back inside its limit"
        elif not table["active"][at]:
            limit, severity = self._high, "info"
            evidence = (
                f"{self.signal} is {number(value)}, above {number(limit)}, and was near or above it when first seen: "
                f"a level that this run inherited, judged from now on by growth beyond {number(own)}"
            )
        else:
            count = int(table["count"][at])
            side = ("above" if high else "below") if count else "not yet clear of"
            evidence = f"{self.signal} is {number(value)}, {side} {number(limit)}"
            evidence += f", for {count} samples" * (count > 1) + more(others)
        return verdict_at(
            self,
            "threshold",
            frame,
            table,
            reading,
            at,
            severity=severity,
            value=value,
            evidence=evidence,
            limit=limit,
            others=others,
            active=active,
        )

    def state_dict(self) -> dict[str, Any]:
        state = {"open": self._open, "table": self._table.state_dict()}
        return state if self._left is None else {**state, "left": self._left.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open = bool(state["open"])
        self._table.load_state_dict(state["table"])
        if self._left is not None:
            self._left.load_state_dict(state.get("left", {}))
