"""A logged run as the frames that its rules were shown, to be judged once more."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from traindiag.record.frame import Frame, Reading
from traindiag.record.log import FrameFacts, Row, Segment, read_segments
from traindiag.record.log_format import unmark
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Lane

_LANES: tuple[Lane, ...] = ("fast", "slow", "active")  # in the order in which a step shows them
_Place = tuple[int, int]  # step, and index of the lane


@dataclass
class Recording:
    """One run of a log.

    Args:
        segments: Its jobs, oldest first.

    Attributes:
        lost: After :meth:`frames`, how many readings of each signal the run had and the log has not.
    """

    segments: list[Segment]
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> RunInfo:
        """What was trained, as the latest job tells it."""
        known = [s.info for s in self.segments if s.info is not None]
        return known[-1] if known else RunInfo(run_id=self.segments[0].run)

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read, in words."""
        return tuple(dict.fromkeys(p for s in self.segments for p in s.problems))

    @property
    def spacing(self) -> dict[str, int]:
        """Signals of which the log holds every second, third, ... step only."""
        return {row.signal.name: row.every for s in self.segments for row in s.rows if row.every > 1}

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """``Alert.to_dict`` of what the run itself told, oldest first."""
        ends = self._ends()
        return [a for s, end in zip(self.segments, ends) for a in s.alerts if end is None or a["step"] < end]

    def frames(self) -> Iterator[Frame]:
        """Every frame, in the order in which they were judged; where a later job begins, the earlier ones end."""
        self.lost.clear()
        for segment, end in zip(self.segments, self._ends()):
            yield from self._frames(segment, end)

    def _ends(self) -> list[int | None]:
        """For each job the step at which a later one takes over."""
        ends: list[int | None] = []
        end: int | None = None
        for segment in reversed(self.segments):
            ends.append(end)
            if segment.start is not None:
                end = segment.start if end is None else min(end, segment.start)
        return ends[::-1]

    def _frames(self, segment: Segment, end: int | None) -> Iterator[Frame]:
        def counts(step: int) -> bool:
            return end is None or step < end

        facts = {(f.step, _LANES.index(f.lane)): f for f in segment.frames if counts(f.step)}
        samples: dict[_Place, dict[str, tuple[Row, int]]] = {}
        for row in segment.rows:
            own = _LANES.index(row.signal.lane)
            for k, step in enumerate(row.steps.tolist()):
                # a monitor may send a signal on another lane
                at = next((i for i in (own, *range(len(_LANES))) if _has(facts.get((step, i)), row.signal.name)), own)
                if counts(step):
                    samples.setdefault((step, at), {})[row.signal.name] = row, k
        run = segment.infos[0][-1] if segment.infos else RunInfo(run_id=segment.run)
        later = [((step, _LANES.index(lane)), info) for step, lane, info in segment.infos[1:]]
        for place in sorted(samples.keys() | facts.keys()):
            while later and later[0][0] <= place:
                run = later.pop(0)[1]
            yield self._frame(place, facts.get(place), samples.get(place, {}), run, segment.number)

    def _frame(
        self, place: _Place, facts: FrameFacts | None, found: dict[str, tuple[Row, int]], run: RunInfo, segment: int
    ) -> Frame:
        names = found if facts is None else dict.fromkeys((*facts.names, *found))
        self.lost.update(name for name in names if name not in found)
        readings = {name: _reading(*found[name]) for name in names if name in found}
        step, lane = place[0], _LANES[place[1]]
        if facts is None:  # of an older version, damaged, or of the last steps before a crash
            return Frame(step, lane, readings, run, segment=segment)
        return Frame(
            step,
            lane,
            readings,
            run,
            time=facts.time,
            seconds_per_step=facts.seconds_per_step,
            updates=facts.updates,
            learning_rates=facts.learning_rates,
            segment=segment,
            early=facts.early,
            batches=facts.batches,
        )


def read_recordings(path: str | os.PathLike[str]) -> list[Recording]:
    """Every run at or under ``path``, in the order they began; none where there is no log of ours.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
    """
    return [Recording(s) for s in sorted(read_segments(path).values(), key=lambda s: s[0].time)]


def _has(facts: FrameFacts | None, name: str) -> bool:
    return facts is not None and name in facts.names


def _reading(row: Row, k: int) -> Reading:
    values = row.values[k]
    ranks = row.ranks
    return Reading(row.signal, row.cells, values, unmark(values), None if ranks is None else ranks[k])
