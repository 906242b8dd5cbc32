"""Drift of output logits is told where nothing is gained by it."""

import math

import numpy as np

from tests.rules.frames import frame, reading
from traindiag.record.cells import Cells
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.rule import Verdict

SITE = Cells.along("site", ["lm"])


def judged(
    log_z: list[float], score: list[float], sure: list[float] | None = None, rule: OutputDrift | None = None
) -> list[Verdict]:
    rule, sure = rule or OutputDrift(), [0.1] * len(log_z) if sure is None else sure
    said = []
    for step, (z, s, o) in enumerate(zip(log_z, score, sure)):
        readings = [
            reading([z], "output/log_z_max_abs", SITE),
            reading([s], "output/target_z_score", SITE),
            reading([o], "output/overconfidence", SITE),
        ][: 2 if math.isnan(o) else 3]
        said += rule.update(frame(10 * step, *readings))
    return said


FLAT, DRIFT = [5.0] * 10, list(np.geomspace(6, 200, 20))


def test_drift_without_gain_is_told_once_it_is_large() -> None:
    said = judged(FLAT + DRIFT, [2.0] * 30)
    assert said and said[0].active and said[0].signal == "output/log_z_max_abs"
    assert "gained 0.0%" in said[0].evidence and said[0].value > 20
    assert said[0].evidence.endswith("and the loss lies 0.1 nats above the entropy of the prediction")


def test_logits_that_the_loss_asks_for_are_not() -> None:
    to_thirty = FLAT + list(np.geomspace(6, 30, 20))
    assert judged(to_thirty, [2.0] * 30)
    assert judged(to_thirty, [2.0] * 30, [-0.01] * 30) == []
    assert judged(to_thirty, [2.0] * 30, [-0.2, 0.2] * 15) == []  # a model that is as sure as it is right
    assert judged(to_thirty, [2.0] * 30, [math.nan] * 30) == []


def test_beyond_what_a_gradient_can_ask_for_they_are_whatever_the_model_thinks_of_itself() -> None:
    for sure in (-0.01, 0.0, math.nan):
        said = judged(FLAT + DRIFT, [2.0] * 30, [sure] * 30)
        assert said and said[0].value > 40 and "entropy" not in said[0].evidence


def test_drift_that_comes_with_learning_is_not() -> None:
    assert judged(FLAT + DRIFT, list(np.geomspace(1, 4, 30))) == []


def test_a_large_level_that_stays_is_not() -> None:
    assert judged([90.0] * 40, [2.0] * 40) == []


def test_growth_to_a_small_value_is_not() -> None:
    assert judged([0.5] * 10 + list(np.geomspace(0.6, 15, 20)), [2.0] * 30) == []


def test_holes_and_bad_values_are_left_out() -> None:
    z, score = FLAT + DRIFT, [2.0] * 30
    z[3], z[15], score[18] = math.nan, math.inf, math.nan
    assert judged(z, score)


def test_it_ends_when_the_drift_does() -> None:
    said = judged(FLAT + DRIFT + [200.0] * 12, [2.0] * 42)
    assert said[0].active and not said[-1].active
