"""What is wired wrongly is told; what is so by design, or settled by one healthy sample, is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from tests.rules.frames import frame, reading
from tests.rules.test_alive import cells
from tests.rules.test_resume_anywhere import carried
from traindiag.record.cells import Cells
from traindiag.record.frame import Frame
from traindiag.rules.rule import Verdict
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded, Wiring


def frames(signal: str, rows: Sequence[Mapping[str, float | None]]) -> list[Frame]:
    """Rows of ``{parameter: value}``; None is not seen."""
    made = []
    for step, row in enumerate(rows):
        seen = [v is not None for v in row.values()]
        values = [0.0 if v is None else v for v in row.values()]
        both = signal in ("wiring/ungraded", "wiring/unchanged")
        of = cells(*row) if both else Cells.along("parameter", row)
        made.append(frame(step, reading(values, signal, of, seen)))
    return made


def told(rule: Wiring, made: Sequence[Frame]) -> list[tuple[int, str, str] | None]:
    found = []
    for f in made:
        verdicts: Sequence[Verdict] = rule.update(f)
        v = verdicts[0] if verdicts else None
        found.append(
            None if v is None else (v.others + 1, v.severity if v.active else "over", str(v.cell.coordinates[-1]))
        )
    return found


def test_no_gradient_in_three_samples_from_the_first_on() -> None:
    row = {"a": 1.0, "b": 0.0}
    assert told(Ungraded(), frames("wiring/ungraded", [row] * 4)) == [None, None, *[(1, "warning", "a")] * 2]


def test_a_branch_that_has_had_a_gradient_once_is_wired() -> None:
    rows = [{"a": 0.0}] + [{"a": 1.0}] * 9
    assert told(Ungraded(), frames("wiring/ungraded", rows)) == [None] * 10


def test_samples_that_do_not_see_it_leave_the_count_alone() -> None:
    rows: list[dict[str, float | None]] = [{"a": 1.0}, {"a": None}, {"a": 1.0}, {"a": None}, {"a": 1.0}]
    assert told(Ungraded(), frames("wiring/ungraded", rows))[-1] == (1, "warning", "a")
    assert told(Ungraded(), frames("wiring/ungraded", rows[:-1]))[-1] is None


def test_it_is_over_when_a_gradient_comes() -> None:
    rows = [{"a": 1.0}] * 3 + [{"a": 0.0}] * 2
    assert told(Ungraded(), frames("wiring/ungraded", rows))[2:] == [(1, "warning", "a"), (1, "over", "a"), None]


def still(step: int, update: float, zero: float, rms: float) -> Frame:
    of = cells("moves", "a")
    return frame(
        step,
        reading([0.1, update], "optimizer/update_rms", of),
        reading([0.0, zero], "gradient/zero_fraction", of),
        reading([1.0, rms], "gradient/rms", of),
    )


def test_a_learning_rate_of_zero() -> None:
    assert told(Unchanged(), [still(s, 0.0, 0.0, 0.1) for s in range(3)]) == [None, None, (1, "warning", "a")]


def test_what_has_no_gradient_or_moves_later_or_is_a_structural_zero_is_not_unchanged() -> None:
    assert told(Unchanged(), [still(s, 0.0, 1.0, 0.0) for s in range(6)]) == [None] * 6
    assert told(Unchanged(), [still(s, 0.0 if s < 2 else 0.1, 0.0, 0.1) for s in range(6)]) == [None] * 6
    assert told(Unchanged(), [still(s, 0.0, 0.0, 1e-9) for s in range(6)]) == [None] * 6
    # the end of a schedule
    assert told(Unchanged(), [still(s, 0.1 if s == 0 else 0.0, 0.0, 0.1) for s in range(6)]) == [None] * 6


def test_the_flag_alone_where_updates_are_not_measured() -> None:
    rows = [{"a": 1.0, "b": 0.0}] * 3
    assert told(Unchanged(), frames("wiring/unchanged", rows))[-1] == (1, "warning", "a")


def with_trained(made: Sequence[Frame], *names: str) -> list[Frame]:
    owners = reading([1.0] * len(names), "wiring/owners", Cells.along("parameter", names))
    return [Frame(f.step, f.lane, {**f.readings, "wiring/owners": owners}, f.run) for f in made]


def test_a_frozen_tensor_that_changes_once() -> None:
    made = frames(
        "wiring/frozen_changed", [{"a.w": 0.0, "a.b": 0.0}, {"a.w": 1.0, "a.b": 0.0}, {"a.w": 0.0, "a.b": 0.0}]
    )
    assert told(FrozenChanged(), with_trained(made, "head.w", "head.b")) == [
        None,
        (1, "warning", "a.w"),
        (1, "over", "a.w"),
    ]


@pytest.mark.parametrize(
    ("row", "trained", "severity"),
    [
        ({"teacher.0.w": 1, "teacher.0.b": 1}, ["student.0.w", "student.0.b"], "info"),
        ({"teacher.0.w": 1, "teacher.0.b": 1}, ["0.w", "0.b"], "info"),  # a copy of the model itself
        ({"teacher.0.w": 1, "teacher.0.b": 0}, ["student.0.w", "student.0.b"], "warning"),  # only a part follows
        ({"back.0.w": 1, "back.0.b": 1}, ["head.1.w", "head.1.b"], "warning"),  # no copy of anything
        ({"body.w": 1}, ["head.w"], "warning"),  # one tensor is like another by chance
    ],
)
def test_a_teacher_follows_its_student(row: dict[str, float], trained: list[str], severity: str) -> None:
    made = with_trained(frames("wiring/frozen_changed", [row] * 3), *trained)
    assert {v[1] for v in told(FrozenChanged(), made) if v} == {severity}


def test_a_target_network_is_copied_now_and_then() -> None:
    rows = [{"target.w": float(s % 2), "target.b": float(s % 2)} for s in range(5)]
    made = with_trained(frames("wiring/frozen_changed", rows), "net.w", "net.b")
    assert told(FrozenChanged(), made)[1] == (2, "info", "target.w")


def test_owners() -> None:
    rows = [{"a": 1.0, "b": 0.0, "c": 2.0}] * 2
    rule = Owners()
    assert told(rule, frames("wiring/owners", rows)) == [None, (2, "warning", "b")]


def test_parts_that_differ_from_the_start_and_replicas_that_drift() -> None:
    rows = [{"part": 1.0, "w": 0.0}] * 3 + [{"part": 1.0, "w": 1.0}] * 3
    said = told(ReplicasDiffer(), frames("wiring/replicas_differ", rows))
    assert said == [None, (1, "info", "part"), (1, "info", "part"), (1, "info", "part"), *[(1, "warning", "w")] * 2]


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_resumed_run_goes_on_where_it_was(cut: int) -> None:
    rows = [{"part": 1.0, "w": 0.0}] * 3 + [{"part": 1.0, "w": 1.0}] * 3
    for kind in (Ungraded, Unchanged, FrozenChanged, Owners, ReplicasDiffer):
        made = frames(kind.signal, rows)
        first, second = kind(), kind()
        told(first, made[:cut])
        second.load_state_dict(carried(first.state_dict()))
        assert told(second, made[cut:]) == told(kind(), made)[cut:]


def test_arguments() -> None:
    with pytest.raises(ValueError, match="persistence must be an integer of at least 1, got 0"):
        Ungraded(persistence=0)


def test_early_looks_count_and_let_the_sleepers_be() -> None:
    """A frame of an early step holds flags of wiring and nothing else."""

    def early(step: int, flag: float) -> Frame:
        return frame(step, reading([flag, 0.0], "wiring/unchanged", cells("a", "b")), early=True)

    flagged = [still(0, 0.0, 0.0, 0.1), early(1, 1.0), early(9, 1.0), early(99, 1.0)]
    assert told(Unchanged(), flagged) == [None, None, *[(1, "warning", "a")] * 2]
    asleep = [still(0, 0.0, 0.0, 1e-9), early(1, 1.0), early(9, 1.0), early(99, 1.0)]
    assert told(Unchanged(), asleep) == [None] * 4
    moved = [still(0, 0.0, 0.0, 0.1), early(1, 0.0), *(still(s, 0.0, 0.0, 0.1) for s in (10, 20, 30))]
    assert told(Unchanged(), moved) == [None] * 5
