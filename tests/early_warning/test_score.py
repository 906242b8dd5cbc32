"""Scores of alarms made by hand, whose answer can be counted on the fingers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.early_warning.alarms import Alarm, events
from benchmarks.early_warning.cures import advised, cure_rate
from benchmarks.early_warning.fates import FAILED, protocol
from benchmarks.early_warning.intervals import clustered
from benchmarks.early_warning.score import LEFT, fates_at_cuts, lead, lead_share, onset, right_names, score
from benchmarks.early_warning.strata import (
    auc,
    dealt_anew,
    first_alarm,
    matched,
    same_configuration,
    with_and_without_cure,
)
from traindiag.alerts.alert import Alert, Remedy

CONSTANTS = protocol()
NAMES = CONSTANTS["diagnosis"]


def alarm(
    told: int, closed: int | None = None, family: str = "attention", diagnosis: str = "", **other: Any
) -> Alarm:
    return Alarm(told - 1, told, closed, "warning", other.pop("rule", "a rule"), family, diagnosis, **other)


def fate(told: str = "healthy", **other: Any) -> dict[str, Any]:
    found = {
        "fate": told, "material": None, "strict": None, "clock": None, "kind": "none", "cure": None, "cures": {},
        "families": [], "injected_at": None, "steps": 1000, "configuration": "a",
    }  # fmt: skip
    if told in FAILED:
        found |= {"material": 600, "strict": 400, "clock": "slow", "kind": "learning_rate"}
    return found | other


def twin(
    run: str = "twin", ended: str = "healthy", *, works: bool = True, material: int | None = None
) -> dict[str, Any]:
    return {"run": run, "fate": ended, "works": works, "material": material, "strict": None}


# -- hits and leads ----------------------------------------------------------------------------


def test_a_hit_is_told_by_the_onset_and_not_over_by_then() -> None:
    assert lead([alarm(100)], 600) == 500
    assert lead([alarm(600)], 600) == 0
    assert lead([alarm(601)], 600) is None
    assert lead([alarm(100, closed=599)], 600) is None
    assert lead([alarm(100, closed=300), alarm(500)], 600) == 100
    assert lead_share([alarm(150)], 600) == 0.75
    assert lead_share([alarm(601)], 600) == 0


def test_a_miss_has_no_lead_and_counts_zero_in_the_mean() -> None:
    fates = {"early": fate("degraded"), "late": fate("degraded"), "never": fate("diverged", kind="output_logits")}
    found = score(fates, {"early": [alarm(300)], "late": [alarm(700)], "never": []}, NAMES)
    slow = found["slow"]["all"]
    assert (slow["runs"], slow["material"]["warned"], slow["strict"]["warned"]) == (3, 1, 1)
    assert slow["material"]["mean_lead_share"] == pytest.approx(0.5 / 3)
    assert slow["strict"]["mean_lead_share"] == pytest.approx(0.25 / 3)
    assert (slow["material"]["median_lead"], slow["material"]["median_lead_of_run"]) == (300, 0.3)
    assert (slow["warned_late"], slow["never_warned"]) == (["late"], ["never"])
    assert found["slow"]["learning_rate"]["material"]["recall"] == 0.5
    assert found["slow"]["output_logits"]["material"]["median_lead"] is None


def test_the_curve_begins_at_recall_and_never_rises() -> None:
    alarms = {"a": [alarm(150)], "b": [alarm(600)], "c": []}
    curve = score({n: fate("degraded") for n in alarms}, alarms, NAMES)["slow"]["all"]["material"]["warned_with_left"]
    assert len(curve) == len(LEFT)
    assert curve[0] == pytest.approx(2 / 3), "warned at the onset itself is warned with nothing left"
    assert curve[LEFT.index(0.75)] == pytest.approx(1 / 3)
    assert curve[LEFT.index(0.8)] == 0


def test_clocks_are_never_pooled() -> None:
    fates = {"s": fate("degraded"), "f": fate("degraded", clock="fast", material=50, strict=40)}
    found = score(fates, {"s": [], "f": [alarm(10)]}, NAMES)
    assert (found["slow"]["all"]["material"]["recall"], found["fast"]["all"]["material"]["recall"]) == (0, 1)


def test_the_third_onset_is_the_first_seen_from_a_twin_that_worked() -> None:
    cures = {"lower_lr": twin(material=500), "qk_norm": twin(material=450), "clip": twin(works=False, material=9)}
    assert onset(fate("degraded", cures=cures), "cured") == 450
    assert onset(fate("degraded"), "cured") is None
    found = score({"x": fate("degraded", cures=cures), "y": fate("degraded")}, {"x": [alarm(460)], "y": []}, NAMES)
    assert (found["slow"]["all"]["cured"]["runs"], found["slow"]["all"]["cured"]["warned"]) == (1, 0)


def test_family_and_diagnosis_are_right_only_if_told_in_time() -> None:
    told = fate("degraded", families=["attention"], cures={"qk_norm": twin(material=500)})
    right = alarm(100, diagnosis="attention-logit growth")
    late = alarm(601, diagnosis="attention-logit growth")
    wrong = alarm(100, family="optimizer", diagnosis="epsilon regime")
    for alarms, expected in (([right], 1), ([wrong], 0), ([wrong, right], 1), ([wrong, late], 0)):
        at = score({"x": told}, {"x": alarms}, NAMES)["slow"]["all"]["material"]
        assert (at["right_family"], at["right_diagnosis"], at["family_known"]) == (expected, expected, 1)


def test_a_lower_learning_rate_speaks_only_where_nothing_else_cures() -> None:
    both = fate("degraded", kind="attention_logits", cures={"qk_norm": twin(), "lower_lr": twin()})
    only = fate("degraded", kind="attention_logits", cures={"qk_norm": twin(works=False), "lower_lr": twin()})
    assert right_names(both, NAMES) == {"attention-logit growth"}
    assert right_names(only, NAMES) == {"learning rate too high"}


def test_every_kind_and_cure_of_the_protocol_has_its_names() -> None:
    assert NAMES["fault"].keys() == {fault["kind"] for fault in CONSTANTS["fault"]}
    assert NAMES["cure"].keys() <= CONSTANTS["cure"].keys()
    assert set(CONSTANTS["remedy"].values()) <= CONSTANTS["cure"].keys()


# -- healthy, grey, injected -------------------------------------------------------------------


def test_false_alarms_have_the_widest_interval_and_lines_of_their_own() -> None:
    fates = {
        "control": fate(), "hot": fate(configuration="b"), "cured": fate(configuration="c", cure="qk_norm"),
        "grey": fate("grey"), "slow": fate("slow"), "failed twin": fate("degraded", cure="clip"),
    }  # fmt: skip
    alarms = {n: [] for n in fates} | {"hot": [alarm(5), alarm(9, rule="other")], "slow": [alarm(3)]}
    found = score(fates, alarms, NAMES, hot={"hot", "cured"})
    healthy = found["healthy"]
    assert (healthy["all"]["runs"], healthy["all"]["events"], healthy["all"]["false_runs"]) == (3, 2, 1)
    assert healthy["all"]["per_10k"] == pytest.approx(2 / 0.3)
    assert healthy["all"]["per_10k_below"] >= 7.22 / 0.3, "the exact interval of 2 events ends at 7.22"
    assert healthy["all"]["by_rule"] == {"a rule": 1, "other": 1}
    assert {line: h["events"] for line, h in healthy.items()} == {
        "all": 2, "controls and variants": 0, "hot": 2, "cured twins": 0
    }  # fmt: skip
    assert found["false"] == {"hot": ["a rule", "other"]}
    assert found["neither"]["slow"] == {"runs": 1, "share": 1 / 6, "warned": 1}
    assert found["neither"]["grey"]["warned"] == 0
    assert "slow" not in found, "a twin that failed too answers another question"


def test_alarms_that_cluster_widen_the_interval() -> None:
    spread = clustered([1, 0] * 10, [1] * 20, range(20))
    together = clustered([1, 0] * 10, [1] * 20, [i % 2 for i in range(20)])
    assert together[1] - together[0] > spread[1] - spread[0]


def test_an_injected_fault_has_a_delay_and_a_name() -> None:
    told = fate("diverged", injected_at=200, clock="injected", kind="nan")
    named = alarm(203, diagnosis="non-finite values")
    for alarms, within, right, before in (
        ([named], 1, 1, 0),
        ([alarm(204, diagnosis="non-finite values")], 0, 0, 0),
        ([alarm(201, diagnosis="epsilon regime")], 1, 0, 0),
        ([alarm(150, diagnosis="non-finite values")], 0, 0, 1),
    ):
        found = score({"x": told}, {"x": alarms}, NAMES)["injected"]["nan"]
        assert (found["within"], found["named"], found["before"]) == (within, right, before)


def test_fates_are_told_at_other_cuts_and_defects_by_name() -> None:
    fates = {
        "sure": fate(**{"fate_at_0.05": "healthy", "fate_at_0.2": "healthy"}),
        "defect": fate("spiked", **{"fate_at_0.05": "spiked", "fate_at_0.2": "healthy"}),
        "grey": fate("grey", **{"fate_at_0.05": "degraded", "fate_at_0.2": "grey"}),
    }
    found = fates_at_cuts(fates, fates)
    assert found["healthy_and_failed"] == ["defect"]
    assert found["fate"] == {"healthy": 1, "spiked": 1, "grey": 1}
    assert found["fate at 0.2"] == {"healthy": 2, "grey": 1}


def test_a_diagnosis_counts_where_an_answer_is_known() -> None:
    fates = {"variant": fate("degraded", kind="none"), "fault": fate("degraded", kind="epsilon")}
    told = {n: [alarm(100, diagnosis="epsilon regime")] for n in fates}
    at = score(fates, told, NAMES)["slow"]["all"]["material"]
    assert (at["right_diagnosis"], at["diagnosis_known"]) == (1, 1)


# -- matched strata ----------------------------------------------------------------------------


def test_strata_hold_seeds_of_one_configuration_and_twins_at_one_learning_rate() -> None:
    cures = {"qk_norm": twin("q"), "lower_lr": twin("l"), "clip": twin("c", "degraded")}
    fates = {
        "bad": fate("degraded", cures=cures), "good": fate(), "grey": fate("grey"),
        "elsewhere": fate(configuration="b"), "q": fate(configuration="q", cure="qk_norm"),
        "l": fate(configuration="l", cure="lower_lr"), "c": fate("degraded", configuration="c", cure="clip"),
    }  # fmt: skip
    assert same_configuration(list(fates), fates) == [("a", "bad", "good")]
    assert with_and_without_cure(list(fates), fates) == [("a", "bad", "q")]
    found = matched(list(fates), fates, {"blind": lambda run, by: 1.0})["slow"]
    assert [of["pairs"] for of in found.values()] == [1, 1]
    assert found["seeds of one configuration"]["blind"]["auc"] == 0.5


def test_auc_looks_at_first_alarms_until_the_onset_only() -> None:
    fates = {"bad": fate("degraded"), "good": fate()}
    pairs = [("a", "bad", "good")]
    for bad, good, expected in (
        ([alarm(100)], [], 1.0),
        ([alarm(100)], [alarm(50)], 0.0),
        ([alarm(601)], [], 0.5),
        ([alarm(100)], [alarm(700)], 1.0),
        ([], [], 0.5),
    ):
        assert auc(pairs, fates, first_alarm({"bad": bad, "good": good}))["auc"] == expected


def test_alarms_dealt_anew_are_scaled_to_the_other_run() -> None:
    fates = {"a": fate("degraded"), "b": fate("degraded", steps=2000, material=100, strict=90), "h": fate()}
    alarms = {"a": [alarm(40)], "b": [alarm(150)], "h": []}
    found = dealt_anew(fates, alarms)["slow"]
    assert found["own"] == 0.5  # b was warned too late
    assert found["failing"] == 1.0  # a's alarm is told at 80 in b, and b's at 75 in a
    assert found["all"] == 0.5


# -- cures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (("optimizer.lr",), "lower_lr"),
        (("optimizer.adam.lr", "optimizer.sgd.lr"), "lower_lr"),
        (("optimizer.eps",), "eps"),
        (("optimizer.betas",), "beta2"),
        (("clip",), "clip"),
        (("model.query_key_norm",), "qk_norm"),
        (("loss.z_loss",), "z_loss"),
        (("warmup",), "changes warmup"),
        ((), "changes no setting"),
    ],
)
def test_the_first_remedy_of_the_first_alarm_is_what_was_advised(change: tuple[str, ...], cure: str) -> None:
    later = alarm(300, change=("optimizer.weight_decay",))
    assert advised([later, alarm(100, change=change)], CONSTANTS["remedy"]) == cure


def test_cure_rate_counts_twins_that_were_trained() -> None:
    fates = {
        "a": fate("degraded", cures={"qk_norm": twin(), "lower_lr": twin(ended="degraded", works=False)}),
        "b": fate("degraded", cures={"qk_norm": twin(ended="grey"), "lower_lr": twin()}),
        "untried": fate("degraded"),
        "unwarned": fate("degraded", cures={"lower_lr": twin()}),
    }
    warned = [alarm(100, change=("model.query_key_norm",))]
    found = cure_rate(fates, dict.fromkeys(fates, warned) | {"unwarned": []}, CONSTANTS["remedy"])["slow"]
    assert (found["advice"]["healthy"], found["advice"]["tried"]) == (1, 2)
    third = "a third of the learning rate"
    assert (found[third]["healthy"], found[third]["tried"]) == (2, 3)
    assert (found["both"][third]["healthy"], found["both"][third]["tried"]) == (1, 2)
    assert found["not_tried"] == {"qk_norm": 1, "no warning": 1}


# -- events ------------------------------------------------------------------------------------


def message(step: int, severity: str, status: str, remedies: tuple[Remedy, ...] = ()) -> Alert:
    return Alert(
        "e", status, "r", "run", 0, step, 0.0, None, severity, "slow", "output", "output/log_z", "", 1.0, None,  # type: ignore[arg-type]
        "threshold", remedies=remedies,
    )  # fmt: skip


def test_an_event_counts_from_the_message_that_reached_warning_and_keeps_its_remedy() -> None:
    remedies = (Remedy("less", {"optimizer.lr": 0.1}), Remedy("clip", {"clip": 1.0}))
    info = message(10, "info", "opened")
    assert events([info, message(90, "info", "closed")]) == []
    (one,) = events([info, message(20, "warning", "escalated", remedies), message(90, "warning", "closed")])
    assert (one.step, one.told, one.closed, one.change) == (20, 21, 90, ("optimizer.lr",))
