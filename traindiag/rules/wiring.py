"""Parts of a run that are not connected as they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from traindiag.record.cells import Cells
from traindiag.record.frame import BoolArray, FloatArray, Frame
from traindiag.rules import arguments
from traindiag.rules.alive import Alive, idle_members
from traindiag.rules.cell_table import CellTable
from traindiag.rules.rule import COOLDOWN, Rule, Severity, Verdict
from traindiag.rules.wording import names_of

FIRST_SAMPLES = 3
"""Looks in a row, from the first one on, early steps among them: a branch that is used now and then, a first step of
a warm-up with a learning rate of 0, or a zero that moves one look later is no fault."""


class Wiring(Rule):
    """Base of the rules on wiring flags: a cell fails after ``persistence`` flagged samples in a row.

    What fails by design is told as info, everything else as a warning.

    Args:
        persistence: Flagged samples in a row before it speaks.
        cooldown: Steps of rest that end the event.
        name: Name of the rule; that of the signal where it is not given.

    Raises:
        ValueError: If ``persistence`` is below 1 or ``cooldown`` below 0.
    """

    signal: str
    what: str
    """What is wrong with the cells whose names precede it, for one cell and for several, split by a bar."""

    from_the_start = False
    """Whether one healthy sample settles that a cell is wired, for good."""

    def __init__(
        self, *, persistence: int = FIRST_SAMPLES, cooldown: int = COOLDOWN, name: str | None = None
    ) -> None:
        arguments.at_least(1, persistence=persistence)
        arguments.at_least(0, cooldown=cooldown)
        self.persistence, self.cooldown = persistence, cooldown
        self.signals: tuple[str, ...] = (self.signal,)
        self.name = name or self.signal
        self._table = CellTable(count=0, healthy=False, designed=False)
        self._open = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        looked = self._look(frame)
        if looked is None:
            return ()
        values, seen, flagged = looked
        table = self._table
        assert table.cells is not None
        count, healthy, designed = table["count"], table["healthy"], table["designed"]
        if not (self._open or flagged.any() or count.any()):
            healthy |= seen
            return ()
        flagged &= seen
        np.copyto(count, np.where(flagged, count + 1, 0), where=seen)
        judged = ~healthy if self.from_the_start else np.ones_like(seen)
        if flagged.any():
            designed |= flagged & self._by_design(table.cells, flagged, healthy)
        designed &= count > 0
        healthy |= seen & ~flagged
        failing = (count >= self.persistence) & judged
        if not failing.any():
            was, self._open = self._open, False
            return (self._verdict(frame, table.cells, values, failing, active=False),) if was else ()
        self._open = True
        worse = failing & ~designed
        severity: Severity = "warning" if worse.any() else "info"
        return (self._verdict(frame, table.cells, values, worse if worse.any() else failing, severity),)

    def _look(self, frame: Frame) -> tuple[FloatArray, BoolArray, BoolArray] | None:
        """Values, what is seen and what is flagged, in the order of the table; None where there is nothing."""
        reading = frame.readings.get(self.signal)
        if reading is None:
            return None
        values, seen = self._table.align(reading)
        return values, seen, seen & self._flagged(values)

    def _flagged(self, values: FloatArray) -> BoolArray:
        flagged: BoolArray = values == 1
        return flagged

    def _by_design(self, cells: Cells, flagged: BoolArray, healthy: BoolArray) -> BoolArray:
        """Which of the flagged cells may well be as they are on purpose."""
        return np.zeros_like(flagged)

    def _verdict(
        self,
        frame: Frame,
        cells: Cells,
        values: FloatArray,
        among: BoolArray,
        severity: Severity = "warning",
        *,
        active: bool = True,
    ) -> Verdict:
        found = [int(i) for i in np.flatnonzero(among)]
        if active:
            names = names_of([str(cells.coordinates[i][-1]) for i in found])
            evidence = f"{names} {self.what.split('|')[len(found) > 1]}"
            if (samples := int(self._table["count"][found].min())) > 1:
                evidence += f", for {samples} samples"
        else:
            evidence = f"{self.signal} holds nowhere any more"
        at = found[0] if found else 0
        return Verdict(
            self.name,
            "wiring",
            self.signal,
            frame.step,
            active,
            severity,
            cells[at],
            float(values[at]),
            None,
            max(0, len(found) - 1),
            evidence=evidence,
            cooldown=self.cooldown,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open, "table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._open = bool(state["open"])
        self._table.load_state_dict(state["table"])


class Ungraded(Wiring):
    """A tensor that was given to an optimizer has got no gradient in any sample so far.

    Experts and members of lists that no step has used are named by
    :class:`~traindiag.rules.alive.StructuralZeros` instead.
    """

    signal = "wiring/ungraded"
    what = "gets no gradient|get no gradient"
    from_the_start = True

    def _look(self, frame: Frame) -> tuple[FloatArray, BoolArray, BoolArray] | None:
        looked = super()._look(frame)
        if looked is None or not looked[2].any():
            return looked
        values, seen, flagged = looked
        assert self._table.cells is not None
        return values, seen, flagged & ~idle_members(self._table.cells, flagged)


class Unchanged(Wiring):
    """A tensor has a gradient and has not moved in any sample so far: rounding, or a learning rate of 0.

    In samples that hold ``optimizer/update_rms`` too, a tensor with a learning rate of 0 is seen. Tensors that are
    structural zeros are left out.
    """

    signal = "wiring/unchanged"
    what = "has a gradient and does not change|have a gradient and do not change"
    from_the_start = True

    def __init__(
        self, *, persistence: int = FIRST_SAMPLES, cooldown: int = COOLDOWN, name: str | None = None
    ) -> None:
        super().__init__(persistence=persistence, cooldown=cooldown, name=name)
        self.signals = (self.signal, "optimizer/update_rms")
        self._alive = Alive()

    def _look(self, frame: Frame) -> tuple[FloatArray, BoolArray, BoolArray] | None:
        self._alive.look(frame)
        update, zeros = (frame.readings.get(n) for n in ("optimizer/update_rms", "gradient/zero_fraction"))
        if update is None or zeros is None:
            looked = super()._look(frame)
            if looked is None or not looked[2].any():
                return looked
            values, seen, flagged = looked
            assert self._table.cells is not None
            awake = self._alive.among(frame, self._table.cells)
            return values, seen & (awake | ~flagged), flagged & awake
        values, seen = self._table.align(update)
        still = seen & (values == 0)
        if not still.any():
            return values, seen, still
        cells = self._table.cells
        assert cells is not None
        live = zip(zeros.cells.coordinates, zeros.values, zeros.seen)
        has = {at for at, zero, there in live if there and not zero >= 1}
        judged = np.array([at in has for at in cells.coordinates]) & self._alive.among(frame, cells)
        return values, seen & (judged | ~still), still & judged

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alive": self._alive.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._alive.load_state_dict(state["alive"])


class FrozenChanged(Wiring):
    """A tensor that nothing trains has changed.

    A module that changes as a whole and is a copy of a trained one (a teacher or a target network, which follows its
    student) does so on purpose: info.
    """

    signal = "wiring/frozen_changed"
    what = "is frozen and changed|are frozen and changed"

    def __init__(self, *, persistence: int = 1, cooldown: int = COOLDOWN, name: str | None = None) -> None:
        super().__init__(persistence=persistence, cooldown=cooldown, name=name)
        self.signals = (self.signal, "wiring/owners")
        self._trained: set[str] = set()

    def update(self, frame: Frame) -> Sequence[Verdict]:
        owners = frame.readings.get("wiring/owners")
        if owners is not None and len(owners.cells) != len(self._trained):
            self._trained = {str(c[-1]) for c in owners.cells.coordinates}
        return super().update(frame)

    def _by_design(self, cells: Cells, flagged: BoolArray, healthy: BoolArray) -> BoolArray:
        tails = {name.partition(".")[2] for name in self._trained} | self._trained
        followers: dict[str, list[int]] = {}
        for i, coordinates in enumerate(cells.coordinates):
            followers.setdefault(str(coordinates[-1]).partition(".")[0], []).append(i)
        designed = np.zeros_like(flagged)
        for members in followers.values():
            names = [str(cells.coordinates[i][-1]) for i in members]
            frozen = [i for i, name in zip(members, names) if name not in self._trained]
            copies = all(str(cells.coordinates[i][-1]).partition(".")[2] in tails for i in frozen)
            # a module in which something is trained is no copy, and one tensor may be like another by chance
            whole = len(frozen) == len(members) > 1 and 2 * int(flagged[frozen].sum()) > len(frozen)
            designed[frozen] = copies and whole
        return designed

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "trained": sorted(self._trained)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._trained = set(state["trained"])


class Owners(Wiring):
    """A trainable tensor belongs to no optimizer, or to several."""

    signal = "wiring/owners"
    what = "is trainable and not in exactly one optimizer|are trainable and not in exactly one optimizer"

    def __init__(self, *, persistence: int = 2, cooldown: int = COOLDOWN, name: str | None = None) -> None:
        super().__init__(persistence=persistence, cooldown=cooldown, name=name)

    def _flagged(self, values: FloatArray) -> BoolArray:
        flagged: BoolArray = values != 1
        return flagged


class ReplicasDiffer(Wiring):
    """Ranks hold different values of a tensor that they should share.

    Those that differ from the first sample on may be parts of one tensor by design (tensor or expert parallelism):
    info, unless some tensor that was the same has drifted apart.
    """

    signal = "wiring/replicas_differ"
    what = "differs between ranks|differ between ranks"

    def __init__(self, *, persistence: int = 2, cooldown: int = COOLDOWN, name: str | None = None) -> None:
        super().__init__(persistence=persistence, cooldown=cooldown, name=name)

    def _by_design(self, cells: Cells, flagged: BoolArray, healthy: BoolArray) -> BoolArray:
        return ~healthy
