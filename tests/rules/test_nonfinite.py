"""NaN and infinity are told first, by name."""

from __future__ import annotations

import math

import numpy as np

from tests.rules.frames import frame, reading
from traindiag.record.cells import Cells
from traindiag.record.frame import Reading
from traindiag.record.run_info import RunInfo
from traindiag.record.signal import Signal
from traindiag.rules.nonfinite import NonFinite

PARAMETERS = Cells(("optimizer", "parameter"), tuple(("adam", n) for n in ("embed", "block.0", "block.1", "head")))


def gradients(*norms: float, seen: list[bool] | None = None) -> Reading:
    return reading(norms, "gradient/parameter_norm", PARAMETERS, seen)


def test_the_first_parameter_in_forward_order_is_named() -> None:
    rule = NonFinite()
    assert not rule.update(frame(0, gradients(1, 1, 1, 1), reading([2.0], "loss/value"), lane="fast"))
    nan = math.nan
    (verdict,) = rule.update(frame(1, reading([2.0], "loss/value"), gradients(1, nan, nan, 1), lane="fast"))
    assert (verdict.severity, verdict.signal, str(verdict.cell)) == (
        "critical", "gradient/parameter_norm", "adam block.0",
    )  # fmt: skip
    assert "block.0, first in forward order of 2 of 4 parameters, block.1 the last" in verdict.evidence
    assert verdict.others == 1


def test_one_event_while_it_goes_on() -> None:
    rule, nan = NonFinite(), math.nan
    losses = [1.0, nan, nan, math.inf, 1.0, 1.0]
    said = [[v.active for v in rule.update(frame(i, reading([x], "loss/value")))] for i, x in enumerate(losses)]
    assert said == [[], [True], [True], [True], [False], []]


def test_a_slow_signal_stays_bad_until_its_next_sample() -> None:
    rule = NonFinite()
    assert rule.update(frame(0, reading([1.0, math.nan], "attention/max_logit")))[0].severity == "critical"
    assert not rule.update(frame(1, reading([1.0], "loss/value"), lane="fast"))
    assert not rule.update(frame(10, reading([1.0, 1.0], "attention/max_logit")))[0].active


def test_what_was_not_looked_at_is_said() -> None:
    rule = NonFinite()
    rule.update(frame(10, reading([1.0], "attention/max_logit")))
    (verdict,) = rule.update(frame(13, reading([math.nan], "loss/value"), lane="fast"))
    assert "attention and activations were not looked at in this step (the last is from step 10)" in verdict.evidence
    rule.update(frame(20, reading([1.0], "attention/max_logit")))
    (verdict,) = rule.update(frame(20, reading([math.nan], "loss/value"), lane="fast"))
    assert "not looked at" not in verdict.evidence


def test_absent_is_not_nan() -> None:
    assert not NonFinite().update(frame(0, gradients(1, 1, 1, 1, seen=[True, False, False, True])))


def test_numbers_of_the_users_own_are_a_warning() -> None:
    rule = NonFinite()
    own = reading([math.nan], Signal("logged/auroc", ("place",), "metric"))
    assert rule.update(frame(0, own))[0].severity == "warning"
    auxiliary = reading([math.nan], Signal("loss/auxiliary", ("place",), "loss"))
    assert rule.update(frame(1, own, auxiliary))[0].severity == "critical"


def test_a_loss_scaler_may_skip_some_steps() -> None:
    run, rule = RunInfo(precision="16-mixed"), NonFinite(scaler_patience=3)
    rows = [(math.inf, 1.0)] * 2 + [(1.0, 1.0)] + [(math.inf, 1.0)] * 4 + [(math.inf, math.nan)]
    said = []
    for i, (norm, loss) in enumerate(rows):
        verdicts = rule.update(
            frame(i, gradients(norm, 1, 1, 1), reading([loss], "loss/value"), run=run, lane="fast")
        )
        said.append(verdicts[0].severity if verdicts[0].active else "over")
    assert said == ["info", "info", "over", "info", "info", "info", "critical", "critical"]
    (plain,) = NonFinite().update(frame(0, gradients(math.inf, 1, 1, 1)))
    assert plain.severity == "critical"


def test_the_rank_is_passed_on() -> None:
    base = reading([1.0, math.nan], "attention/max_logit")
    told = Reading(base.signal, base.cells, base.values, base.seen, np.array([0, 5], np.int64))
    assert NonFinite().update(frame(0, told))[0].rank == 5


def test_an_early_look_at_wiring_is_no_sample_of_activations() -> None:
    rule = NonFinite()
    rule.update(frame(0, reading([1.0], "activation/rms")))
    rule.update(frame(1, reading([0.0], "wiring/ungraded"), early=True))
    (verdict,) = rule.update(frame(1, reading([math.nan], "loss/value"), lane="fast"))
    assert "the last is from step 0" in verdict.evidence
