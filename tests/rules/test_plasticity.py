"""What the rules on plasticity say of critics that lose it, keep it, and only look as if they lost it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.rules.frames import frame, reading
from traindiag.record.cells import Cells
from traindiag.record.run_info import RunInfo
from traindiag.rules.default_pack import default_rules
from traindiag.rules.plasticity import EarlyLoss, LostPlasticity, PlasticityPlateau
from traindiag.rules.plasticity_panel import PlasticityPanel, Stages
from traindiag.rules.rule import Rule, Verdict

EVERY = 500


def looks(rule: Rule, metrics: Mapping[str, Sequence[float]], run: RunInfo | None = None) -> list[Verdict | None]:
    """What a rule says to a critic's looks, one every 500 updates; layers of a signal speak through one cell."""
    said: list[Verdict | None] = []
    for i, row in enumerate(zip(*metrics.values())):
        made = frame(EVERY * (i + 1), *readings(EVERY * (i + 1), dict(zip(metrics, row))), lane="active", run=run)
        verdicts = rule.update(made)
        assert len(verdicts) <= 1
        said.append(verdicts[0] if verdicts else None)
    return said


def readings(updates: int, row: Mapping[str, float]) -> Iterable[Any]:
    yield reading([updates], "plasticity/updates", Cells.along("module", ["critic"]))
    for metric, value in row.items():
        name = f"plasticity/{metric}"
        made = reading([value], name)
        place = ("critic", "critic.0")[: len(made.cells.axes)]
        yield reading([value], name, Cells(made.cells.axes, (place,)), seen=[not math.isinf(value)])


def severities(said: Sequence[Verdict | None]) -> list[str]:
    return ["" if v is None else v.severity if v.active else "over" for v in said]


LOST = [0.45, 0.44, 0.35, 0.25, 0.22, 0.2, 0.2, 0.19, 0.19, 0.19, 0.19, 0.19]
"""An early loss without recovery."""
RECOVERS = [0.45, 0.35, 0.25, 0.2, 0.2, 0.25, 0.3, 0.35, 0.4, 0.42, 0.43, 0.43, 0.43, 0.43, 0.43, 0.43]
DECLINES = [0.45] * 8 + list(np.linspace(0.45, 0.15, 24))
"""A plateau, and a slow decline late in training."""
LEARNS = [0.438, 0.427, 0.405, 0.401, 0.397, 0.396, 0.394, 0.393, 0.391, 0.390, 0.389, 0.388]
"""DQN on CartPole, measured: a run that learns."""
LEARNS_AT_8 = [0.427, 0.39, 0.36, 0.34, 0.33, 0.325, 0.32, 0.31, 0.305, 0.3, 0.297, 0.295]
"""The same with eight updates a step, which learned better and kept 0.69 of its active units."""


# -- early loss


def test_an_early_loss_that_does_not_recover_is_told() -> None:
    said = looks(EarlyLoss(), {"fau_pooled": LOST})
    assert severities(said).index("warning") == 7  # the third look in a row whose mean of three is below 0.6
    verdict = said[-1]
    assert verdict is not None and verdict.cell.coordinates == ("critic",) and verdict.kind == "stage"
    assert verdict.value == pytest.approx(0.19) and verdict.limit == pytest.approx(0.6 * 0.45)
    assert verdict.evidence.startswith(
        "plasticity/fau_pooled is 0.19, 42% of the 0.45 that it was at first, for 7 looks"
    )


def test_with_another_sign_it_is_critical() -> None:
    dormant = [0.2] * 6 + [0.5] * 6
    said = looks(EarlyLoss(), {"fau_pooled": LOST, "dormant_025": dormant})
    assert severities(said)[7:] == ["warning", "critical", "critical", "critical", "critical"]
    assert said[-1] is not None and "plasticity/dormant_025 is 0.5 at critic.0, 0.2 once settled" in said[-1].evidence


def test_weight_norm_is_no_second_witness_of_an_early_loss() -> None:
    said = looks(EarlyLoss(), {"fau_pooled": LOST, "weight_norm_ratio": [20.0] * 12})
    assert set(severities(said)) == {"", "warning"}


@pytest.mark.parametrize("course", [RECOVERS, DECLINES, LEARNS, LEARNS_AT_8], ids=["back", "late", "rr1", "rr8"])
def test_what_recovers_declines_late_or_learns_is_left_alone(course: list[float]) -> None:
    assert [v for v in looks(EarlyLoss(), {"fau_pooled": course}) if v is not None] == []


def test_where_the_length_is_known_early_is_the_first_three_tenths() -> None:
    def told(length: int) -> bool:
        run = RunInfo(length=length)
        return any(v is not None and v.active for v in looks(EarlyLoss(), {"fau_pooled": LOST}, run))

    assert told(length=20 * EVERY) and not told(length=12 * EVERY)


def test_a_loss_that_comes_back_is_over() -> None:
    said = severities(looks(EarlyLoss(), {"fau_pooled": [*LOST, 0.3, 0.4, 0.45, 0.45]}))
    assert "over" in said and said[-1] == ""


# -- the panel


def test_one_sign_is_a_note_two_are_a_warning_three_are_critical() -> None:
    falls, rises = [100.0] * 4 + [30.0] * 6, [0.1] * 4 + [0.4] * 6
    steady = {"fau_pooled": [0.45] * 10}
    one = looks(LostPlasticity(), {**steady, "srank_99": falls})
    assert severities(one) == [""] * 6 + ["info"] * 4
    two = looks(LostPlasticity(), {**steady, "srank_99": falls, "dormant_025": rises})
    assert severities(two) == [""] * 6 + ["warning"] * 4
    three = looks(LostPlasticity(), {"fau_pooled": [0.45] * 4 + [0.2] * 6, "srank_99": falls, "dormant_025": rises})
    assert severities(three)[-1] == "critical"
    assert three[-1] is not None and three[-1].evidence.count(";") == 2


def test_signs_of_one_kind_are_one_witness() -> None:
    falls = [100.0] * 4 + [30.0] * 6
    said = looks(LostPlasticity(), {"srank_99": falls, "feature_rank": falls})
    assert set(severities(said)) == {"", "info"}
    said = looks(LostPlasticity(), {"fau_pooled": [0.45] * 4 + [0.2] * 6, "dead": [0.1] * 4 + [0.9] * 6})
    assert set(severities(said)) == {"", "info"}


def test_weight_norm_counts_beside_another_sign_only() -> None:
    norm, falls = [20.0] * 10, [100.0] * 4 + [30.0] * 6
    alone = looks(LostPlasticity(), {"weight_norm_ratio": norm, "fau_pooled": LEARNS_AT_8[:10]})
    assert set(severities(alone)) == {"", "info"}  # a run that learned well, with 15 times its first norm
    assert severities(looks(LostPlasticity(), {"weight_norm_ratio": norm, "srank_99": falls}))[-1] == "warning"


def test_ranks_and_dormant_units_are_held_against_what_they_are_once_settled() -> None:
    """In the first thousand updates of a run that learns the data shape them."""
    rank = [128.0, 45.0, 45.0, 44.0, 43.0, 42.0, 41.0, 41.0]
    dormant = [0.28, 0.48, 0.47, 0.49, 0.48, 0.5, 0.49, 0.48]
    said = looks(LostPlasticity(), {"srank_99": rank, "dormant_025": dormant})
    assert [v for v in said if v is not None] == []


def test_trainability_and_fit() -> None:
    absent = math.inf  # seen at every tenth look only
    trains = [1.0] + [absent] * 3 + [1.8] + [absent] * 5
    said = looks(LostPlasticity(), {"trainability": trains, "explained_variance": [0.5] * 4 + [-0.5] * 6})
    assert severities(said) == [""] * 4 + ["info"] * 2 + ["warning"] * 4


def test_one_odd_look_is_no_sign() -> None:
    said = looks(LostPlasticity(), {"fau_pooled": [0.45, 0.1, 0.45, 0.45], "srank_99": [100.0, 90.0, 95.0, 10.0]})
    assert [v for v in said if v is not None] == []


def test_a_panel_that_recovers_is_over() -> None:
    falls = [100.0] * 4 + [30.0] * 4 + [100.0] * 2
    assert severities(looks(LostPlasticity(), {"srank_99": falls}))[-2:] == ["over", ""]


def test_nan_is_left_to_the_rule_on_nan() -> None:
    for rule in (EarlyLoss(), LostPlasticity(), PlasticityPlateau()):
        said = looks(rule, {"fau_pooled": [0.45, 0.44] + [math.nan] * 10, "srank_99": [math.nan] * 12})
        assert [v for v in said if v is not None] == []


# -- the plateau


def test_a_plateau_at_a_healthy_level_is_noted_and_one_of_a_dead_critic_is_not() -> None:
    said = looks(PlasticityPlateau(), {"fau_pooled": LEARNS})
    assert severities(said)[-1] == "info" and said[-1] is not None and said[-1].value >= 0.8 * 0.438
    assert severities(looks(PlasticityPlateau(), {"fau_pooled": LOST})) == [""] * 12


def test_a_plateau_ends_where_units_are_lost() -> None:
    said = severities(looks(PlasticityPlateau(), {"fau_pooled": LEARNS + [0.2] * 4}))
    assert "over" in said and said[-1] == ""


def test_stages() -> None:
    stages = Stages(window=3, band=0.02)
    found = [stages.take(v) for v in RECOVERS]
    assert found[:5] == [None] * 5 and found[5] == "falling" and "recovering" in found and found[-1] == "plateau"


# -- soft divergence


def test_values_beyond_any_return_are_a_warning_and_twice_that_is_critical() -> None:
    rule = next(r for r in default_rules() if r.name == "plasticity/soft-divergence")
    said = looks(rule, {"q_bound_ratio": [0.5, 1.1, 1.38, 1.4, 2.5, 2.6]})
    assert severities(said) == ["", "", "warning", "warning", "critical", "critical"]


# -- what all of them share


@pytest.mark.parametrize("build", [EarlyLoss, LostPlasticity, PlasticityPlateau])
@pytest.mark.parametrize("cut", [1, 5, 8, 11])
def test_a_resumed_rule_says_what_an_unbroken_one_does(build: type[Rule], cut: int) -> None:
    metrics = {"fau_pooled": LOST + [0.4] * 4, "srank_99": [100.0] * 4 + [30.0] * 12, "dead": [0.1] * 5 + [0.5] * 11}
    whole = looks(build(), metrics)
    rule = build()
    looks(rule, {name: values[:cut] for name, values in metrics.items()})
    state = json.loads(json.dumps(rule.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    said = []
    for i in range(cut, 16):
        row = {name: values[i] for name, values in metrics.items()}
        made = frame(EVERY * (i + 1), *readings(EVERY * (i + 1), row), lane="active", segment=1)
        said.append(next(iter(resumed.update(made)), None))
    assert said == whole[cut:]


def test_runs_without_plasticity_are_not_their_business() -> None:
    for rule in (EarlyLoss(), LostPlasticity(), PlasticityPlateau()):
        assert rule.update(frame(0, reading([1.0], "loss/value"))) == ()


@pytest.mark.parametrize(
    "wrong", [{"left": 2.0}, {"window": 0}, {"persistence": 0}, {"band": 0.0}, {"early": -1.0}, {"cooldown": -1}]
)
def test_wrong_arguments_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EarlyLoss(**wrong)


def test_a_panel_reads_signals_that_exist() -> None:
    from traindiag.record.catalogue import BY_NAME

    assert set(PlasticityPanel.signals) <= set(BY_NAME)
