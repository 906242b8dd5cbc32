"""Each published rule, on series made by hand; none of them knows the future; weaknesses are kept as published."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException

from benchmarks.early_warning import rivals
from benchmarks.early_warning.rivals import LOSS, RIVALS, ConfigurationAlone, Rival

NAN, INF = math.nan, math.inf
RUN = {"length": 1000, "warmup": 20, "peak_lr": 1e-3, "eps": 1e-8, "qk_norm": 0}
NOISE = (2 + 0.05 * np.random.default_rng(0).standard_normal(3000)).tolist()


def fires(rival: Rival, values: list[float], limit: float = 1.0, **config: float) -> list[int]:
    series = {signal: dict(enumerate(values)) for signal in rival.signals}
    return rival.fires(series, {**RUN, **config}, limit=limit)


def score(rival: Rival, values: list[float]) -> float:
    return float(rival.scores({signal: dict(enumerate(values)) for signal in rival.signals}, RUN)[1][-1])


# -- OLMo-core ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", [rivals.SIX_SIGMA, rivals.SIX_SIGMA_LOSS])
def test_six_sigma(rival: Rival) -> None:
    past = [1.0, 3.0] * 64  # mean 2, deviation 1
    assert fires(rival, [*past, 8.0]) == []  # at the limit is not above it
    assert fires(rival, [*past, 8.1]) == [128]
    assert score(rival, [*past, 5.0]) == pytest.approx(0.5)
    assert fires(rival, [*past[1:], 50.0]) == []  # the window is not full
    assert fires(rival, [2.0] * 128 + [50.0]) == []  # nor has a flat one a deviation


def test_six_sigma_is_blind_for_a_window_after_a_nan() -> None:
    values = [*NOISE[:200], NAN, *NOISE[201:600]]
    values[328] = values[400] = 1e6
    assert fires(rivals.SIX_SIGMA, values) == [400]  # at 328 the NaN is the oldest value of the window


def test_an_outlier_hides_the_next_from_six_sigma() -> None:
    values = list(NOISE[:300])
    values[200], values[230] = 1e3, 50.0
    assert fires(rivals.SIX_SIGMA, values) == [200]


def test_six_sigma_reads_loss_and_gradient_norm() -> None:
    calm, jump = dict(enumerate(NOISE[:200])), dict(enumerate([*NOISE[:150], 9.0, *NOISE[151:200]]))
    assert rivals.SIX_SIGMA.fires({"loss/value": calm, "gradient/norm": jump}, RUN) == [150]
    assert rivals.SIX_SIGMA_LOSS.fires({"loss/value": calm, "gradient/norm": jump}, RUN) == []


def test_skip_step() -> None:
    past = [1.0, 3.0] * 32
    deviation = float(np.std(past[:63], ddof=1))
    mean = float(np.mean(past[:63]))
    assert fires(rivals.SKIP_STEP, [*past[:63], mean + 6.001 * deviation]) == [63]
    assert fires(rivals.SKIP_STEP, [*past[:63], mean + 5.999 * deviation]) == []
    assert fires(rivals.SKIP_STEP, [*past[:62], 50.0]) == []
    assert fires(rivals.SKIP_STEP, [2.0] * 100 + [2.1]) == [100]  # a flat past allows nothing


def test_skip_step_speaks_at_a_nan_and_as_long_as_it_stays() -> None:
    series = {s: dict(enumerate([*NOISE[:200], NAN, *NOISE[201:500]])) for s in rivals.SKIP_STEP.signals}
    steps, scores = rivals.SKIP_STEP.scores(series, RUN)
    assert steps[scores >= 1].tolist() == list(range(200, 329))


# -- LLM-Foundry -------------------------------------------------------------------------------


def test_twice_the_mean_five_times_in_a_row() -> None:
    calm = [2.0] * 100
    assert fires(rivals.KILL_LOSS_SPIKE, [*calm, *[4.5] * 5]) == [104]
    assert fires(rivals.KILL_LOSS_SPIKE, [*calm, *[4.5] * 4, 2.0, *[4.5] * 4]) == []
    assert fires(rivals.KILL_LOSS_SPIKE, [*calm, *[4.5] * 5], length=4000) == []  # its window is 200 then
    assert fires(rivals.KILL_LOSS_SPIKE, [*calm, 4.0]) == []
    assert score(rivals.KILL_LOSS_SPIKE, [*calm, *[3.0] * 5]) == pytest.approx(
        3.0 / 2 / np.mean([2.0] * 96 + [3.0] * 4)
    )


def test_half_of_the_window_above_the_largest_of_the_first() -> None:
    assert fires(rivals.KILL_LOSS_SPIKE, [2.0] * 200 + [2.1] * 60) == [250]  # fifty of a hundred before it
    assert fires(rivals.KILL_LOSS_SPIKE, [11.0] * 200 + [12.0] * 60) == [199]  # the cap is 10 at most


def test_a_slow_climb_and_a_nan_are_nothing_to_kill_loss_spike() -> None:
    fall = np.linspace(11, 2, 300).tolist()  # so that the cap is 10
    assert fires(rivals.KILL_LOSS_SPIKE, [*fall, *np.linspace(2, 9.9, 2000)]) == []
    assert fires(rivals.KILL_LOSS_SPIKE, [*fall, *[2.0] * 200, *[3.9] * 500]) == []
    assert fires(rivals.KILL_LOSS_SPIKE, [*[2.0] * 150, *[NAN] * 20]) == []
    assert fires(rivals.KILL_LOSS_SPIKE, [*[2.0] * 150, NAN, *[9.0] * 20]) == []


def test_delayed_mean() -> None:
    assert fires(rivals.DELAYED_MEAN, [1.0] * 500 + [7.6]) == [500]
    assert fires(rivals.DELAYED_MEAN, [1.0] * 500 + [7.5]) == []
    assert fires(rivals.DELAYED_MEAN, [1.0] * 499 + [7.6]) == []
    assert fires(rivals.DELAYED_MEAN, [1.0] * 600 + [7.6] * 300) == [600]  # a cluster is not held against itself
    assert fires(rivals.DELAYED_MEAN, [NAN] + [1.0] * 1001 + [9.0]) == [1002]
    assert fires(rivals.DELAYED_MEAN, [NAN] + [1.0] * 800 + [9.0]) == []


# -- ZClip, Megatron-LM, Lightning -------------------------------------------------------------


def test_z_clip() -> None:
    past = [1.0, 3.0] * 12 + [2.0]  # mean 2, variance 24 / 25
    deviation = math.sqrt(24 / 25)
    assert fires(rivals.Z_CLIP, [*past, 2 + 2.51 * deviation]) == [25]
    assert fires(rivals.Z_CLIP, [*past, 2 + 2.49 * deviation]) == []
    # what enters after an outlier of z = 250 is 2 + 2.5 deviations / 100, so the second is as much of one
    assert fires(rivals.Z_CLIP, [*past, 2 + 250 * deviation, 2.0, 2 + 2.6 * deviation]) == [25, 27]


def test_one_nan_silences_z_clip_for_good() -> None:
    assert fires(rivals.Z_CLIP, [*NOISE[:100], NAN, *NOISE[101:2000], 1e9]) == []
    assert fires(rivals.Z_CLIP, [*NOISE[:2000], 1e9])[-1] == 2000


@pytest.mark.parametrize("rival", [rivals.MEGATRON_LOSS, rivals.MEGATRON_GRADIENT])
def test_ten_times_the_largest_of_the_first_hundred(rival: Rival) -> None:
    assert fires(rival, [11.0, *[2.0] * 99, 109.0, 110.0, 2.0, -110.0]) == [101, 103]
    assert fires(rival, [11.0, *[2.0] * 98, 1e9, 110.0]) == []  # the hundredth still counts
    assert fires(rival, [2.0] * 150 + [NAN, INF]) == []
    assert fires(rival, [NAN, *[2.0] * 99, 1e9, 20.0]) == []  # and a NaN does not


def test_running_mean() -> None:
    assert fires(rivals.LIGHTNING, [2.0] * 20 + [6.0]) == [20]
    assert fires(rivals.LIGHTNING, [2.0] * 20 + [5.9]) == []
    assert fires(rivals.LIGHTNING, [2.0] * 20 + [-9.0]) == []  # away from the mean, but falling
    assert fires(rivals.LIGHTNING, [2.0] * 20 + [NAN, 2.0, 9.0]) == [20]  # the run ends there
    assert fires(rivals.LIGHTNING, [1000.0] + [2.0] * 9 + [300.0]) == []
    assert fires(rivals.LIGHTNING, [2.0] * 20 + np.linspace(2, 1000, 5000).tolist()) == []  # slowly, anything goes


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40), st.booleans())
def test_running_mean_is_lightnings_own(values: list[int], with_nan: bool) -> None:
    # so that no loss lies exactly at its limit, where float32 means would decide
    losses = [*(value + 0.1234 for value in values), *([NAN] if with_nan else [])]
    whole = SimpleNamespace(root_device="cpu", barrier=lambda: None, reduce_boolean_decision=lambda x, all: x)
    real, stopped = SpikeDetection(), []

    def handle(fabric: Any, batch: int) -> None:
        raise TrainingSpikeException(batch)

    real._handle_spike = handle  # type: ignore[method-assign]  # it writes a file otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch, loss in enumerate(losses):
            try:
                real.on_train_batch_end(SimpleNamespace(strategy=whole), torch.tensor(loss).double(), None, batch)  # type: ignore[arg-type]
            except TrainingSpikeException:
                stopped.append(batch)
                break
    assert fires(rivals.LIGHTNING, losses) == stopped


# -- fixed limits ------------------------------------------------------------------------------


def test_fixed_limits() -> None:
    assert fires(rivals.LOGIT_1E4, [1.0, 1e4, 1.1e4, NAN, 2e4]) == [2, 4]
    assert fires(rivals.LOGIT_100, [100.0, 101.0]) == [1]
    assert fires(rivals.AUTOTRAINER_LOSS, [2.0, 999.0, 1e3, 2.0, NAN, 2.0, -INF]) == [2, 4, 6]
    assert fires(rivals.RMS_2_3, [9.0] * 20 + [1.0, 2.3]) == [21]


# -- our controls ------------------------------------------------------------------------------


def test_the_loss_alone_tells_a_jump_that_stays_a_slow_rise_and_a_nan() -> None:
    assert fires(rivals.LOSS_ALONE, NOISE) == []
    assert fires(rivals.LOSS_ALONE, [*NOISE[:500], *(x + 1 for x in NOISE[500:600])])[0] == 502
    assert fires(rivals.LOSS_ALONE, [*NOISE[:500], 9.0, 9.0, *NOISE[502:]]) == []  # two are not three
    rise = [x + 1e-3 * max(0, i - 500) for i, x in enumerate(NOISE)]
    (first, *_) = fires(rivals.LOSS_ALONE, rise)
    assert 500 < first < 750  # where the loss has risen by five times its noise, at most
    assert fires(rivals.LOSS_ALONE, [*NOISE[:10], NAN, *NOISE[11:]]) == [10]
    assert fires(rivals.LOSS_ALONE, [*NOISE[:500], NAN, INF, *(x + 1 for x in NOISE[502:600])])[:2] == [500, 504]


def test_the_loss_alone_is_silent_while_the_loss_falls() -> None:
    rng = np.random.default_rng(1)
    for heavy in (rng.standard_normal(1500), rng.standard_t(3, 1500)):
        steps = np.arange(1500)
        falling = 2 + 9 * np.exp(-steps / 60) + 2 / np.sqrt(1 + steps / 50) + 0.05 * heavy
        assert fires(rivals.LOSS_ALONE, falling.tolist()) == []


def ladder(qk_norm: int, from_lr: float) -> list[tuple[dict[str, float], bool]]:
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    return [({**RUN, "peak_lr": lr, "qk_norm": qk_norm}, lr >= from_lr) for lr in rates]


def test_the_configuration_alone_learns_the_ladder() -> None:
    runs = ladder(0, 1e-2) + ladder(1, 1e-1)
    control = ConfigurationAlone.fit([c for c, _ in runs], [wrong for _, wrong in runs])
    series = {LOSS: {5: 3.0, 6: 2.9}, "gradient/norm": ([4, 5], [1.0, 1.0])}
    assert [bool(control.fires(series, config)) for config, _ in runs] == [wrong for _, wrong in runs]
    assert control.fires(series, runs[5][0]) == [4]  # before anything was seen
    between = [control.probability({**RUN, "peak_lr": lr}) for lr in (1e-3, 2e-3, 5e-3, 2e-2)]
    assert between == sorted(between)
    assert control.fires({LOSS: {0: NAN}}, runs[0][0]) == []  # and whatever is seen


def test_the_configuration_alone_takes_other_features() -> None:
    small = [({**c, "convolutional": 1}, wrong) for c, wrong in ladder(0, 1e-2)]
    large = [({**c, "convolutional": 0}, wrong) for c, wrong in ladder(0, 3e-1)]
    configs, wrong = zip(*small, *large, strict=True)
    blind = ConfigurationAlone.fit(configs, wrong)
    told = ConfigurationAlone.fit(configs, wrong, features={**rivals.FEATURES, "convolutional": float})
    series = {LOSS: {0: 3.0}}
    assert [bool(told.fires(series, config)) for config in configs] == list(wrong)
    assert [bool(blind.fires(series, config)) for config in configs] != list(wrong)


def test_the_configuration_alone_cannot_be_fitted_to_one_fate() -> None:
    with pytest.raises(ValueError, match="of both kinds; got 2 configurations and 0 of 2 unstable"):
        ConfigurationAlone.fit([RUN, RUN], [False, False])
    with pytest.raises(KeyError, match="needs \\['eps'\\]"):
        ConfigurationAlone.fit([{k: v for k, v in RUN.items() if k != "eps"}] * 2, [False, True])


# -- all of them -------------------------------------------------------------------------------

VALUES = st.lists(
    st.one_of(st.floats(0.5, 4.0), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([2.0, 1e3, NAN])),
    min_size=2,
    max_size=60,
)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda r: r.name)
@settings(max_examples=25)
@given(data=st.data(), tail=VALUES, begun=st.sampled_from([0, 90, 190, 520]))
def test_no_verdict_knows_the_future(rival: Rival, data: st.DataObject, tail: list[float], begun: int) -> None:
    values = [*NOISE[:begun], *tail]
    series = {signal: dict(enumerate(values[i:])) for i, signal in enumerate(rival.signals)}
    cut = data.draw(st.integers(max(0, begun - 5), len(values) - 1))
    known = {signal: {s: v for s, v in readings.items() if s <= cut} for signal, readings in series.items()}
    steps, scores = rival.scores(series, RUN)
    early_steps, early_scores = rival.scores(known, RUN)
    np.testing.assert_array_equal(early_steps, steps[steps <= cut])
    np.testing.assert_array_equal(early_scores, scores[steps <= cut])
    for limit in (0.5, 1.0, 2.0):
        opened = rival.fires(series, RUN, limit=limit)
        assert rival.fires(known, RUN, limit=limit) == [step for step in opened if step <= cut]


@pytest.mark.parametrize("rival", RIVALS, ids=lambda r: r.name)
def test_a_higher_limit_is_reached_by_fewer_steps_and_arrays_do_as_well(rival: Rival) -> None:
    values = [*NOISE[:700], *np.geomspace(2, 1e7, 400), 1e9]
    series = {signal: dict(enumerate(values)) for signal in rival.signals}
    arrays = {signal: (np.arange(len(values)), np.array(values)) for signal in rival.signals}
    assert rival.fires(arrays, RUN) == rival.fires(series, RUN)
    firsts = [min(rival.fires(series, RUN, limit=limit), default=INF) for limit in (0.3, 0.6, 1.0, 3.0)]
    assert firsts == sorted(firsts) and firsts[0] < INF
    assert rival.source and rival.name


def test_names_differ_and_a_missing_signal_is_told() -> None:
    assert len({r.name for r in RIVALS}) == len(RIVALS)
    with pytest.raises(KeyError, match="6 sigma, loss reads 'loss/value'; these signals are there: \\['loss'\\]"):
        rivals.SIX_SIGMA_LOSS.fires({"loss": {0: 1.0}}, RUN)


def test_steps_that_were_not_sampled_are_no_values() -> None:
    sparse = {"attention/max_logit": {20: 2e4, 0: 1.0, 10: 1.0}}
    assert rivals.LOGIT_1E4.scores(sparse, RUN)[0].tolist() == [0, 10, 20]
    assert rivals.LOGIT_1E4.fires(sparse, RUN) == [20]
