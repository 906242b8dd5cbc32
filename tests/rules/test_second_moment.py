"""A limit that goes with beta2."""

import math

import pytest

from tests.rules.frames import active_at, frame, reading
from traindiag.record.cells import Cells
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.rule import Verdict
from traindiag.rules.second_moment import StaleSecondMoment

NAME = "optimizer/sentinel_rms_t"


def judged(values: list[float], beta2: float, *, start: int = 5000, warmup: int = 0) -> list[Verdict | None]:
    run = RunInfo(warmup=warmup, optimizers=(OptimizerInfo("adam", "AdamW", {"betas": [0.9, beta2]}),))
    cells = Cells(("optimizer", "parameter"), (("adam", "embed.weight"),))
    rule, said = StaleSecondMoment(), []
    for i, value in enumerate(values):
        verdicts = rule.update(frame(start + i, reading([value], NAME, cells), lane="fast", run=run))
        said.append(verdicts[0] if verdicts else None)
    return said


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99, 0.999])
def test_the_limit_is_three_quarters_of_what_there_can_be_and_no_less_than_the_published_one(beta2: float) -> None:
    limit = max(2.3, 0.75 / math.sqrt(1 - beta2))
    assert active_at(judged([1.0, limit * 0.99, limit * 1.01, 1.0], beta2)) == [2]


def test_at_095_the_published_limit_is_noise() -> None:
    assert active_at(judged([2.5, 3.0], 0.95)) == []
    said = judged([4.2], 0.95)
    assert said[0] is not None and "near the 4.47 of a gradient that is all new" in said[0].evidence


def test_the_first_steps_and_warm_up_are_not_judged() -> None:
    assert active_at(judged([31.0] * 4, 0.999, start=0)) == []
    assert active_at(judged([31.0] * 4, 0.999, start=1998)) == [2, 3]
    assert active_at(judged([31.0] * 4, 0.999, start=5000, warmup=5002)) == [2, 3]


def test_nan_is_neither_failing_nor_back() -> None:
    said = judged([31.0, math.nan, 1.0], 0.999)
    assert active_at(said) == [0]
    assert said[-1] is not None and not said[-1].active


def test_infinity_is_somebody_elses_business_and_opens_nothing_that_never_ends() -> None:
    assert judged([1.0, math.inf, 1.0, 1.0], 0.999) == [None] * 4


def test_it_is_told_what_is_expected() -> None:
    with pytest.raises(ValueError, match="sentinel_rms_t or optimizer/rms_t"):
        StaleSecondMoment(signal="loss/value")
