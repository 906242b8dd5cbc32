"""Rivals at a budget that is set on one split and used on another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.early_warning.alarms import Alarm
from benchmarks.early_warning.contest import FEATURES, Fitted, alarms_at, beside, contest, highest, limit_for
from benchmarks.early_warning.rivals import LOSS_ALONE, RIVALS
from benchmarks.early_warning.seen import Seen
from tests.early_warning.test_score import alarm, fate

INF = math.inf
NAME = LOSS_ALONE.name


def scores(*values: float) -> tuple[Any, Any]:
    return np.arange(len(values)), np.array(values)


def config(lr: float) -> dict[str, float]:
    return {"length": 1000, "warmup": 10, "peak_lr": lr, "lr_times": lr, "eps": 1e-8, "qk_norm": 0, "norm": 1}


# -- the budget --------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5) | st.just(INF) | st.just(-INF), min_size=1, max_size=12), st.integers(0, 12))
def test_the_limit_is_the_lowest_that_keeps_the_budget(maxima: list[float], allowed: int) -> None:
    limit = limit_for(maxima, allowed)
    if limit is None:
        assert sum(m == INF for m in maxima) > allowed, "no limit keeps a run quiet whose score is infinite"
        return
    judged = [m for m in maxima if m > -INF]  # the others have no score that could reach a limit
    assert sum(m >= limit for m in judged) <= allowed
    lower = [m for m in judged if m < limit]
    if lower:
        assert sum(m >= max(lower) for m in judged) > allowed


def test_the_highest_score_passes_over_what_was_not_judged() -> None:
    assert highest(scores(math.nan, 0.5, 0.2)) == 0.5
    assert highest(scores(math.nan)) == -INF
    assert highest(None) == -INF


def test_openings_at_a_limit_count_from_the_step_and_are_never_over() -> None:
    found = alarms_at({"a": scores(0, 2, 2, 0, 3)}, ["a", "has not the signal"], 1.0, once=False)
    assert [(a.told, a.closed) for a in found["a"]] == [(1, None), (4, None)]
    assert found["has not the signal"] == []
    assert len(alarms_at({"a": scores(0, 2, 0, 3)}, ["a"], 1.0, once=True)["a"]) == 1
    assert alarms_at({"a": scores(INF)}, ["a"], None, once=False)["a"] == []


# -- fitted on one split, used on another ------------------------------------------------------


def split(false_of_ours: int) -> tuple[dict[str, Seen], dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Four healthy runs whose losses score .2, .4, .6 and 2, and two failing ones."""
    seen, fates, configs = {}, {}, {}
    for i, top in enumerate((0.2, 0.4, 0.6, 2.0)):
        seen[f"h{i}"] = Seen([alarm(5)] if i < false_of_ours else [], {NAME: scores(0, top, 0)})
        fates[f"h{i}"], configs[f"h{i}"] = fate(configuration=f"h{i}"), config(1e-3)
    for i in range(2):
        seen[f"f{i}"] = Seen([alarm(300)], {NAME: scores(0, 0.7, 1.5)})
        fates[f"f{i}"], configs[f"f{i}"] = fate("degraded", configuration=f"f{i}"), config(1e-1)
    return seen, fates, configs


def test_a_limit_allows_as_many_false_runs_as_ours_has_on_the_tuning_split() -> None:
    for false, above in ((0, 2.0), (1, 0.6), (2, 0.4)):
        limit = Fitted.on(*split(false)).limits[NAME]
        assert limit is not None
        assert above < limit < above + 1e-9
    assert set(Fitted.on(*split(0)).limits) == {*(r.name for r in RIVALS), *FEATURES}


def test_the_limit_of_the_tuning_split_is_used_unchanged_elsewhere() -> None:
    fitted = Fitted.on(*split(1))
    seen, fates, configs = split(0)
    seen["h0"] = Seen([], {NAME: scores(0, 0.65, 0)})  # false there, though ours is silent on all
    found = contest(seen, fates, configs, fitted)[NAME]
    assert found["budget"]["healthy"]["false_runs"] == 2
    assert found["published"]["healthy"]["false_runs"] == 1
    assert found["budget"]["slow"]["material"]["recall"] == 1


def test_configuration_alone_is_fitted_on_fates_and_speaks_at_step_0() -> None:
    fitted = Fitted.on(*split(0))
    found = contest(*split(0), fitted)["configuration alone"]["published"]
    assert (found["healthy"]["false_runs"], found["slow"]["material"]["mean_lead_share"]) == (0, 1.0)


def test_what_has_no_clear_fate_teaches_nothing() -> None:
    seen, fates, configs = split(0)
    learned = Fitted.on(seen, fates, configs)
    unclear = {"grey": fate("grey"), "lags": fate("slow"), "nan": fate("diverged", injected_at=200, clock="injected")}
    more = seen | {n: Seen([alarm(5)], {NAME: scores(9.0)}) for n in unclear}
    assert Fitted.on(more, fates | unclear, configs | dict.fromkeys(unclear, config(1e-3))) == learned


def test_differences_are_paired() -> None:
    fates = {"a": fate("degraded", configuration="a"), "b": fate("degraded", configuration="b")}
    ours = {"a": [alarm(300)], "b": [alarm(150)]}
    theirs = {"a": [Alarm(450, 450, None, "warning", "", "", "")], "b": []}
    found = beside(["a", "b"], fates, ours, theirs)["material"]
    assert found["mean_lead_share"] == pytest.approx(0.25 / 2)
    assert found["ours_more"] == pytest.approx((0.25 + 0.75) / 2)
    assert (found["ours_more_low"], found["ours_more_high"]) == (0.25, 0.75)
