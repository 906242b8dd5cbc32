"""A first block that gets next to nothing."""

import math

from tests.rules.frames import active_at, frame, reading
from traindiag.record.cells import Cells
from traindiag.rules.rule import Verdict
from traindiag.rules.vanishing import Vanishing

CELLS = Cells(("optimizer", "block"), tuple(("adam", b) for b in ("embed", "net.0", "net.1", "net.2", "head")))


def judged(rows: list[list[float]], persistence: int = 3) -> list[Verdict | None]:
    rule, said = Vanishing(persistence=persistence, every=1), []
    for step, row in enumerate(rows):
        verdicts = rule.update(frame(step, reading(row, "gradient/block_norm", CELLS), lane="fast"))
        said.append(verdicts[0] if verdicts else None)
    return said


BAD, GOOD = [1e-9, 1e-8, 1e-5, 1e-2, 1.0], [1e-9, 1e-2, 1e-2, 1e-2, 1.0]


def test_it_lasts_before_it_is_told_and_names_both_ends() -> None:
    said = judged([BAD] * 4 + [GOOD])
    assert active_at(said) == [2, 3] and said[2] is not None
    assert "net.0" in said[2].evidence and "1.0e-06 of that of net.2" in said[2].evidence
    assert said[4] is not None and not said[4].active


def test_small_everywhere_is_not_vanishing_and_neither_is_a_small_share_of_much() -> None:
    assert active_at(judged([[1e-9, 1e-8, 1e-8, 1e-8, 1e-8]] * 9)) == []
    assert active_at(judged([[1.0, 1e-3, 1.0, 1e3, 1.0]] * 9)) == []


def test_all_zero_and_nan_are_left_to_others() -> None:
    assert active_at(judged([[0.0, 0.0, 0.0, 0.0, 0.0]] * 9 + [[0.0, math.nan, 0.0, 1.0, 1.0]] * 9)) == []
