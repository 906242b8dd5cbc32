"""Detectors of other tools, as they were published, and two controls of our own, behind one interface.

Each rule is written anew from what its source says, with its source's numbers. A rule reads one value after the
other and answers with a score, so that no verdict can know the future. A score of 1 is the published limit: the rule
speaks as published where it is 1 or more. Another limit on the same score gives the same rule another rate of false
alarms; what a rule remembers goes on as published.

Where a rule has a weakness, such as a NaN that blinds it, it is kept and told in the rule's own words below.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Config = Mapping[str, float]
"""Numbers of a run that are known before it begins: ``length``, ``warmup`` (steps), ``peak_lr``, ``eps``, ``qk_norm``
(1 where queries and keys are normalised, otherwise 0)."""

Readings = Mapping[int, float] | tuple[Sequence[int] | NDArray[np.int64], Sequence[float] | NDArray[np.float64]]
"""A signal by step, or steps and values in order. Of a signal with many cells, the largest."""

Detector = Callable[[float], float]
"""Takes the next value and gives its score, NaN where the rule does not judge."""

Scores = tuple[NDArray[np.int64], NDArray[np.float64]]

LOSS, GRADIENT_NORM = "loss/value", "gradient/norm"
_JUST_BELOW = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Rival:
    """A detector that looks at signals.

    Args:
        name: What tables call it.
        source: Where it was published.
        signals: What it reads. Each has a detector of its own, and the larger score of a step counts.
        detector: Makes one for a run with this configuration.
        once: Whether the tool stops the run, so that there is no second alarm.

    Example:
        >>> series = {"loss/value": {0: 2.0, 10: 1.9, 20: 2000.0, 30: 3000.0, 40: 1.8}}
        >>> AUTOTRAINER_LOSS.fires(series, {})
        [20]
        >>> AUTOTRAINER_LOSS.scores(series, {})[1].tolist()
        [0.002, 0.0019, 2.0, 3.0, 0.0018]
    """

    name: str
    source: str
    signals: tuple[str, ...]
    detector: Callable[[Config], Detector]
    once: bool = False

    def scores(self, series: Mapping[str, Readings], config: Config) -> Scores:
        """Steps, int64 ``[n]``, at which it had something to read, and its scores there, ``[n]``.

        Raises:
            KeyError: If a signal that it reads is missing.
        """
        by_step: dict[int, float] = {}
        for signal in self.signals:
            if signal not in series:
                raise KeyError(f"{self.name} reads {signal!r}; these signals are there: {sorted(series)}")
            judge = self.detector(config)
            for step, value in _in_order(series[signal]):
                by_step[step] = float(np.fmax(judge(value), by_step.get(step, math.nan)))
        steps = sorted(by_step)
        return np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64)

    def fires(self, series: Mapping[str, Readings], config: Config, *, limit: float = 1.0) -> list[int]:
        """Steps at which an alarm opens: the score reaches the limit, and did not at the step judged before."""
        found = openings(self.scores(series, config), limit)
        return found[:1] if self.once else found


def _in_order(readings: Readings) -> list[tuple[int, float]]:
    pairs = readings.items() if isinstance(readings, Mapping) else zip(*readings, strict=True)
    return sorted((int(step), float(value)) for step, value in pairs)


def openings(scores: Scores, limit: float) -> list[int]:
    """Steps at which a score reaches a limit that it did not reach at the step judged before."""
    steps, values = scores
    above = values >= limit
    before = np.concatenate([[False], above[:-1]])
    return [int(step) for step in steps[above & ~before]]


def _scored(speaks: bool, ratio: float) -> float:
    """The ratio of a value to its limit, made to agree with the rule's verdict where rounding or NaN would not."""
    if speaks:
        return math.inf if math.isnan(ratio) else max(ratio, 1.0)
    return _JUST_BELOW if ratio >= 1 else ratio


def _over(value: float, limit: float) -> float:
    if limit == 0 or math.isnan(limit):
        return math.nan if value == 0 or math.isnan(limit) else math.copysign(math.inf, value)
    return value / limit


def _mean_and_deviation(values: Sequence[float], freedom: int) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) * (x - mean) for x in values) / freedom)


# -- relative to a window ----------------------------------------------------------------------


def six_sigma(config: Config) -> Detector:
    """OLMo-core's StabilityMonitor: above the mean by 6 standard deviations of the last 128 values.

    Source: ``src/olmo_core/train/callbacks/stability_monitor.py`` at fa6c501. The window must be full and leaves the
    new value out; the deviation is the biased one; below 1e-10 it never speaks. A NaN is no spike and silences it
    for the 128 values that it stays in the window. An outlier that entered raises the next one's limit.
    """
    past: deque[float] = deque(maxlen=128)

    def judge(value: float) -> float:
        score = math.nan
        if len(past) == past.maxlen:
            mean, deviation = _mean_and_deviation(past, len(past))
            if not deviation < 1e-10:
                score = _scored(value > mean + 6 * deviation, _over(value - mean, 6 * deviation))
        past.append(value)
        return score

    return judge


def skip_step(config: Config) -> Detector:
    """OLMo-core's SkipStepOptimizer: the same 6 standard deviations over 128 values, judged from the 64th on.

    Source: ``src/olmo_core/optim/skip_step_optimizer.py`` at fa6c501; Levanter has it too. The window leaves the new
    value out and the deviation is the unbiased one. A step is taken only if the value is *not above* the limit, so a
    NaN speaks, and goes on speaking for as long as it stays in the window.
    """
    past: deque[float] = deque(maxlen=128)

    def judge(value: float) -> float:
        score = math.nan
        if len(past) + 1 >= 64:
            mean, deviation = _mean_and_deviation(past, len(past) - 1)
            takes = value - mean <= 6 * deviation
            score = _scored(not takes, _over(value - mean, 6 * deviation))
        past.append(value)
        return score

    return judge


def kill_loss_spike(config: Config) -> Detector:
    """LLM-Foundry's KillLossSpike: twice the mean for five values in a row, or half of the window above a cap.

    Source: ``llmfoundry/callbacks/kill_loss_spike_callback.py`` at 8c8dd48. The window is 5 % of the run, at least
    100 values, and leaves the new one out. The cap counts from two windows on and is the largest loss of the first
    window, at most 10, as its documentation says; in the code the cap stays at 10, because it is learned only if the
    batch counter, which is one ahead by then, equals the window. What is documented is the stronger rule, and is the
    one here. A NaN never speaks, ends a row of five, and silences the mean for a window. Outliers enter the window,
    so a loss that climbs slowly enough never reaches twice its mean.
    """
    size = max(100, round(0.05 * config["length"]))
    past: deque[float] = deque(maxlen=size)
    row: deque[float] = deque([-math.inf] * 5, maxlen=5)
    cap, seen = math.nan, 0

    def judge(value: float) -> float:
        nonlocal cap, seen
        seen += 1
        score = math.nan
        if len(past) == size:
            if math.isnan(cap):
                cap = min(max((x for x in past if not math.isnan(x)), default=10.0), 10.0)
            mean = sum(past) / size
            ratio = _scored(value >= 2 * mean, _over(value, 2 * mean))
            row.append(-math.inf if math.isnan(ratio) else ratio)
            score = min(row)
            if seen >= 2 * size:
                # half of them lie above the cap exactly if the value in the middle does
                middle = sorted((-math.inf if math.isnan(x) else x for x in past), reverse=True)[-(-size // 2) - 1]
                score = max(score, _scored(middle > cap, _over(middle, cap)))
        past.append(value)
        return score

    return judge


def z_clip(config: Config) -> Detector:
    """ZClip: 2.5 standard deviations above an exponential mean.

    Source: arXiv 2504.02507 and ``zclip/zclip.py``, its defaults: factor 0.97 for mean and variance, begun with 25
    values, 1e-6 added to the deviation. What enters after an outlier is the value that it was clipped to,
    mean + 2.5 deviations / (z / 2.5). It was made to clip, not to tell anyone, and clips healthy runs often. A NaN
    enters the mean and silences it for the rest of the run.
    """
    first: list[float] = []
    mean = variance = math.nan

    def judge(value: float) -> float:
        nonlocal mean, variance
        if len(first) < 25:
            first.append(value)
            if len(first) == 25:
                mean, deviation = _mean_and_deviation(first, 25)
                variance = deviation * deviation
            return math.nan
        deviation = math.sqrt(variance)
        z = (value - mean) / (deviation + 1e-6)
        entering = mean + 2.5 * deviation / (z / 2.5) if z > 2.5 else value
        mean = 0.97 * mean + 0.03 * entering
        variance = 0.97 * variance + 0.03 * (entering - mean) * (entering - mean)
        return _scored(z > 2.5, z / 2.5)

    return judge


def ten_times_the_first_hundred(config: Config) -> Detector:
    """Megatron-LM's rerun machine: ten times the largest absolute value of the first 100.

    Source: ``megatron/core/rerun_state_machine.py``, ``is_unexpectedly_large`` with the threshold of its callers.
    The maximum is never renewed, so a loss that fell from 11 to 2 must reach 110. NaN and infinity are left to
    another check and do not count.
    """
    largest, count = 0.0, 0

    def judge(value: float) -> float:
        nonlocal largest, count
        if not math.isfinite(value):
            return math.nan
        if count < 100:
            count += 1
            largest = max(largest, abs(value))
            return math.nan
        return _scored(abs(value) >= 10 * largest, _over(abs(value), 10 * largest))

    return judge


def running_mean_spike(config: Config) -> Detector:
    """Lightning's SpikeDetection: away from the mean of the last ten by twice that mean, and rising.

    Source: ``lightning/fabric/utilities/spike.py`` of 2.6.6, its defaults (window 10, rtol 2, warm-up of one batch,
    finite only). A value that is not above the one before is never a spike; one that is not finite always is. It
    ends the run, and what was a spike does not enter the mean. So the loss must triple within ten steps.
    """
    past: deque[float] = deque(maxlen=10)
    last, seen = 0.0, 0

    def judge(value: float) -> float:
        nonlocal last, seen
        seen += 1
        score = math.nan
        if seen > 1:
            if not math.isfinite(value):
                return math.inf
            if past and not value <= last:
                mean = sum(past) / len(past)
                away = abs(value - mean)
                score = _scored(away >= abs(2 * mean), _over(away, abs(2 * mean)))
                if score >= 1:
                    return score
        if math.isfinite(value):
            past.append(value)
        last = value
        return score

    return judge


def delayed_mean(config: Config) -> Detector:
    """LLM-Foundry's OutlierDetector: 7.5 times the mean of the values from 1000 to 500 steps ago.

    Source: ``llmfoundry/optim/outlier_detection.py`` at 8c8dd48, where each tensor's norm has one. It speaks from
    the 501st value on. A NaN silences it for the 500 values that it stays in the delayed mean.
    """
    waiting: deque[float] = deque()
    delayed: deque[float] = deque(maxlen=500)

    def judge(value: float) -> float:
        if len(waiting) == 500:
            delayed.append(waiting.popleft())
        waiting.append(value)
        if not delayed:
            return math.nan
        mean = sum(delayed) / len(delayed)
        return _scored(value > 7.5 * mean, _over(value, 7.5 * mean))

    return judge


# -- fixed limits ------------------------------------------------------------------------------


def above(limit: float, *, strictly: bool = True) -> Callable[[Config], Detector]:
    """A value above ``limit``, or also at it. NaN is above nothing."""

    def judge(value: float) -> float:
        return _scored(value > limit or (not strictly and value == limit), value / limit)

    return lambda config: judge


def large_or_not_finite(limit: float) -> Callable[[Config], Detector]:
    """A value at or above ``limit``, NaN or infinite."""

    def judge(value: float) -> float:
        return _scored(not math.isfinite(value) or value >= limit, value / limit if value > -math.inf else math.nan)

    return lambda config: judge


def above_after_warmup(limit: float) -> Callable[[Config], Detector]:
    """A value at or above ``limit``, once as many values as warm-up has steps have passed."""

    def make(config: Config) -> Detector:
        seen = 0

        def judge(value: float) -> float:
            nonlocal seen
            seen += 1
            return math.nan if seen <= config["warmup"] else _scored(value >= limit, value / limit)

        return judge

    return make


# -- our own controls --------------------------------------------------------------------------

LEVEL, SPREAD, YOUNGEST = 15, 100, 32
_JUMP, _RISE = 6.0, 8.0


def loss_alone(config: Config) -> Detector:
    """The best that we could make of the loss and nothing else, for the question whether other signals add anything.

    The noise is the robust standard deviation of the steps from one value to the next (1.4826 / sqrt 2 times their
    median size, over 100 values), which neither a trend nor an outlier inflates. It speaks when the last three values
    all lie 6 of those above the median of the 15 before each of them (a jump that stays), or when the median of the
    last 15 lies 8 of its standard errors above the lowest that it has been (a slow rise). It judges from the 32nd
    value on. A value that is not finite speaks at once and is left out of everything else.
    """
    past: deque[float] = deque(maxlen=SPREAD)
    levels: deque[float] = deque(maxlen=LEVEL)
    jumps: deque[float] = deque([-math.inf] * 3, maxlen=3)
    lowest = math.inf

    def judge(value: float) -> float:
        nonlocal lowest
        if not math.isfinite(value):
            return math.inf
        score = math.nan
        if len(past) >= YOUNGEST - 1:
            values = np.array(past)
            steps = np.abs(np.diff(np.append(values, value)))
            noise = max(1.4826 / math.sqrt(2) * float(np.median(steps)), 1e-3 * abs(float(np.median(values))), 1e-12)
            jumps.append((value - float(np.median(values[-LEVEL:]))) / noise)
            level = float(np.median(np.append(values[1 - LEVEL :], value)))
            if len(levels) == LEVEL:  # the lowest of those that share no value with this one
                lowest = min(lowest, levels[0])
            levels.append(level)
            error = noise * math.sqrt(math.pi / 2 / LEVEL) * math.sqrt(2)
            score = max(min(jumps) / _JUMP, (level - lowest) / error / _RISE)
        past.append(value)
        return score

    return judge


FEATURES: Mapping[str, Callable[[float], float]] = {
    "peak_lr": math.log10,
    "warmup": math.log1p,
    "eps": math.log10,
    "qk_norm": float,
}
"""What a configuration is judged by where nothing else is said, and on which scale."""


@dataclass(frozen=True)
class ConfigurationAlone:
    """Says before the first step which runs will go wrong, from their configuration: it looks at no signal at all.

    A detector that does no better than this one has seen nothing that the learning rate did not say. Fitted by
    :meth:`fit` on the runs that limits are tuned on. A score of 1 is a probability of one half.

    Args:
        weights: Of the standardised features, the constant last.
        centre: Mean of each feature over the runs that it was fitted on.
        scale: Standard deviation of each; 1 where it did not vary.
        features: Names in a configuration and their scales, in the order of the weights.

    Example:
        >>> rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
        >>> ladder = [{"peak_lr": lr, "warmup": 10, "eps": 1e-8, "qk_norm": 0} for lr in rates]
        >>> control = ConfigurationAlone.fit(ladder, [False, False, False, True, True])
        >>> loss = {"loss/value": {0: 5.0, 1: 4.9}}
        >>> [control.fires(loss, run) for run in ladder]
        [[], [], [], [0], [0]]
    """

    weights: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    features: Mapping[str, Callable[[float], float]] = field(default_factory=lambda: FEATURES)
    name: str = "configuration alone"
    source: str = "ours, a control: logistic regression on the configuration"
    signals: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        configs: Sequence[Config],
        unstable: Sequence[bool],
        *,
        features: Mapping[str, Callable[[float], float]] = FEATURES,
        ridge: float = 0.1,
    ) -> ConfigurationAlone:
        """Fits the logistic regression.

        Args:
            configs: Configurations of the tuning runs.
            unstable: Which of them went wrong.
            features: What to judge by; with models of several kinds also which kind it is, as numbers 0 and 1.
            ridge: Weight of the squared coefficients: without it they have no bound where one limit on the learning
                rate parts the runs without error.

        Raises:
            ValueError: If the lengths differ or all runs ended alike.
        """
        wrong = np.array(unstable, np.float64)
        if len(configs) != len(wrong) or len(set(wrong)) < 2:
            raise ValueError(
                f"expected as many fates as configurations, of both kinds; got {len(configs)} configurations and "
                f"{int(wrong.sum())} of {len(wrong)} unstable"
            )
        raw = np.array([_scaled(features, config) for config in configs])
        centre, scale = raw.mean(0), raw.std(0)
        scale[scale < 1e-9] = 1.0
        x = np.column_stack([(raw - centre) / scale, np.ones(len(raw))])
        penalty = np.diag([ridge] * len(features) + [0.0])
        weights = np.zeros(x.shape[1])
        for _ in range(100):
            p = 1 / (1 + np.exp(-(x @ weights)))
            gradient = x.T @ (p - wrong) + penalty @ weights
            step = np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, gradient)
            # a Newton step may be far too long where all probabilities are near 0 or 1
            weights -= step / max(1.0, float(np.abs(step).max()))
        return cls(tuple(weights.tolist()), tuple(centre.tolist()), tuple(scale.tolist()), features)

    def probability(self, config: Config) -> float:
        """That a run with this configuration goes wrong."""
        x = (np.array(_scaled(self.features, config)) - self.centre) / self.scale
        return float(1 / (1 + np.exp(-(x @ self.weights[:-1] + self.weights[-1]))))

    def scores(self, series: Mapping[str, Readings], config: Config) -> Scores:
        """One score, at the first step of any signal."""
        first = min((step for readings in series.values() for step, _ in _in_order(readings)), default=0)
        return np.array([first], np.int64), np.array([2 * self.probability(config)])

    def fires(self, series: Mapping[str, Readings], config: Config, *, limit: float = 1.0) -> list[int]:
        """The first step, or nothing."""
        return openings(self.scores(series, config), limit)


def _scaled(features: Mapping[str, Callable[[float], float]], config: Config) -> list[float]:
    if missing := [name for name in features if name not in config]:
        raise KeyError(f"configuration alone needs {missing}; these are given: {sorted(config)}")
    return [scale(config[name]) for name, scale in features.items()]


# -- all of them -------------------------------------------------------------------------------

OLMO, FOUNDRY = "OLMo-core @fa6c501", "LLM-Foundry @8c8dd48"
SIX_SIGMA_LOSS = Rival("6 sigma, loss", f"{OLMO} StabilityMonitor, loss only", (LOSS,), six_sigma)
SIX_SIGMA = Rival("6 sigma, loss or gradient", f"{OLMO} StabilityMonitor", (LOSS, GRADIENT_NORM), six_sigma)
SKIP_STEP = Rival("skip step", f"{OLMO} SkipStepOptimizer", (LOSS, GRADIENT_NORM), skip_step)
KILL_LOSS_SPIKE = Rival("2 x mean, 5 in a row", f"{FOUNDRY} KillLossSpike", (LOSS,), kill_loss_spike)
DELAYED_MEAN = Rival("7.5 x delayed mean", f"{FOUNDRY} OutlierDetector", (GRADIENT_NORM,), delayed_mean)
Z_CLIP = Rival("z above 2.5", "ZClip, arXiv 2504.02507", (GRADIENT_NORM,), z_clip)
MEGATRON_LOSS = Rival("10 x first 100, loss", "Megatron-LM rerun machine", (LOSS,), ten_times_the_first_hundred)
MEGATRON_GRADIENT = Rival(
    "10 x first 100, gradient", "Megatron-LM rerun machine", (GRADIENT_NORM,), ten_times_the_first_hundred
)
LIGHTNING = Rival("running mean", "Lightning 2.6.6 SpikeDetection", (LOSS,), running_mean_spike, once=True)
AUTOTRAINER_LOSS = Rival(
    "loss 1e3 or not finite", "AutoTrainer, ICSE 2021: monitor.py", (LOSS,), large_or_not_finite(1e3)
)
LOGIT_1E4 = Rival("max logit 1e4", "arXiv 2309.14322, section 3.1.1", ("attention/max_logit",), above(1e4))
LOGIT_100 = Rival("max logit 100", "QK-Clip of Kimi K2 and Megatron-LM", ("attention/max_logit",), above(100.0))
RMS_2_3 = Rival(
    "RMS_t 2.3",
    "arXiv 2304.13013; it leaves out its first 1000 steps, here those of warm-up are",
    ("optimizer/sentinel_rms_t",),
    above_after_warmup(2.3),
)
LOSS_ALONE = Rival("loss alone", "ours, a control", (LOSS,), loss_alone)

RIVALS = (
    SIX_SIGMA_LOSS, SIX_SIGMA, SKIP_STEP, KILL_LOSS_SPIKE, DELAYED_MEAN, Z_CLIP, MEGATRON_LOSS, MEGATRON_GRADIENT,
    LIGHTNING, AUTOTRAINER_LOSS, LOGIT_1E4, LOGIT_100, RMS_2_3, LOSS_ALONE,
)  # fmt: skip
"""All that need no fitting; :meth:`ConfigurationAlone.fit` makes the one that does."""
