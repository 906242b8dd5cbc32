"""The rules that judge a run by default. Every number has its source beside it.

*Tuning runs* are those of ``benchmarks/early_warning`` that rules may be tuned on: byte-level GPTs and MLPs of 20,000
to 150,000 parameters, 180 of them healthy. Rules are judged on others.
"""

from __future__ import annotations

from traindiag.rules.alive import StructuralZeros
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.rule import Rule
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold
from traindiag.rules.vanishing import Vanishing
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded

LOGIT_DAMAGE = 1e3
"""Loss gets worse from about here. arXiv 2309.14322 appendix E.1, where scaled queries and keys are transplanted into
a trained model. Of 25 small runs that degraded, 16 passed it before their loss showed it; of 66 healthy ones 3 passed
it."""

LOGIT_DIVERGENCE = 1e4
"""Every run of the small-scale proxies with a larger maximum diverged: arXiv 2309.14322 section 3.1.1."""

RAW_LOGIT_PRECISION = 1e4
"""One unit in the last place of bfloat16 is 64 here, so the softmax of low-precision scores is rounding error. The
raw maximum is no sign of instability by itself: a bias on the keys raises it without changing the softmax."""

INHERITED_GROWTH = 10.0
"""Trained models exist whose largest logits are above 2000; a factor of ten is the distance between the two limits of
arXiv 2309.14322, damage at 1e3 and certain divergence at 1e4."""

FORECAST_SAMPLES = 3
FORECAST_PERSISTENCE = 2
"""The fourth sample can speak: with three samples and two in a row, growth that reaches 1e3 between steps 50 and 60
is told at step 40 when every tenth step is sampled, and no healthy run of 14 was (learning rates 1e-3 to 3e-2, 400
and 800 steps, sampled every 5th and every 10th step)."""

SPIKE_FACTOR = 4.0
"""The gradient norm of BLOOM-176B rose fourfold four steps before its first loss spike (.24, .95, 2.4, 16, 145); no
value of the healthy small runs above reaches it."""

SPIKE_Z = 4.0
"""On log-normal noise of sigma 0.35 around a falling norm both conditions together held once in 20,000 steps by
chance, and a tenfold jump was missed in at most 12 of 100 cases at the worst place, none at sigma 0.15."""

SPIKE_WINDOW = 100
"""Steps that the usual deviation is taken from; public run monitors use 100 to 128."""

ATTENTION_INPUT_GROWTH = 8.0
"""Logits grow with the product of query and key norms. In tuning runs whose attention failed they grew ten- to
twenty-five-fold, in healthy ones at most fivefold, in some that merely lagged more: a note."""

EPSILON = 1.0
EPSILON_CRITICAL = 0.1
"""Where the RMS of a gradient is below epsilon, epsilon sets the size of updates: arXiv 2309.14322 section 3.4, where
the largest model's gradients fell to it. Healthy tuning runs stay above 100."""

EPSILON_FALLEN_FROM = 100.0
"""A single tensor is judged only where it came from above: key biases and the like lie below for good."""

STALE_MOMENT = 5.0
"""RMS_t of 2.3 came before 28 of 30 loss spikes of arXiv 2304.13013, and is met by one step in a thousand of healthy
small runs (8 alarms in 10,000 steps at beta2 = 0.95). Five is beyond any of them, and beyond what beta2 = 0.95
allows."""

UPDATE_RATIO = 0.1
"""The median tensor changes by a tenth of itself in an update. TheDeepChecker's band for log10 is -4 to -1; healthy
tuning runs pass it during the first ten steps at most."""

UPDATE_GROWTH = 3.0
"""The median update has grown threefold against the weights since warm-up: a learning rate that was raised, or
weights that no longer grow with it. Healthy tuning runs stay within twofold."""

GRADIENT_GROWTH = 4.0
GRADIENT_GROWTH_STEPS = 50
"""Slow growth of the gradient norm went before the instabilities of OLMo's first runs (arXiv 2501.00656 section 3).
Data that changes does the same to healthy runs, so it is a note."""

GROWTH_EXPONENT = 1.0
"""The size of the residual stream grows e-fold with each block. OLMo's unstable initialisation had 0.1 (arXiv
2501.00656 section 3); small models in their first steps reach 0.5 and recover, and tuning runs that failed by their
activations began above 1.5 or passed 1 before their loss showed it."""

ACTIVATION_GROWTH = 4.0
"""After warm-up the residual stream of healthy tuning runs shrinks or stays; where the learning rate was raised too
far it grew more than tenfold. A critic's grows with its returns, from 0.4 to 13 in a healthy TD3 on Pendulum: runs
without a cross-entropy get a note."""

DEAD_UNITS = 0.9
"""Share of a block's output that is exactly zero. Rectifiers leave 0.5 to 0.75 in healthy tuning runs; those that got
stuck passed 0.9. AutoTrainer takes 0.7 of gradients (Zhang et al. 2021, ICSE)."""

CLIPPED = 0.5
CLIPPED_SAMPLES = 20
"""More than half of the steps clipped is called extremely aggressive by the Deep Learning Tuning Playbook; in a run's
first steps it is usual."""

LOSS_FACTOR = 1.3
LOSS_Z = 8.0
"""Public run monitors take a robust z of 8 on the logarithm: no value of six healthy language models reaches it. It
confirms and never predicts: a note, unless something else jumps with it."""

SCALER_PATIENCE = 20
"""PyTorch's loss scaler starts at 2**16 and halves at every skipped step: after 16 it is at 1, where no scale is left
to blame, and a few more are allowed for a scale that had grown."""


def default_rules() -> list[Rule]:
    """New rules of the default pack.

    Example:
        >>> [rule.name for rule in default_rules()][:2]
        ['nonfinite', 'attention/logit-range']
    """
    return [
        NonFinite(scaler_patience=SCALER_PATIENCE),
        Threshold(
            "attention/logit_range",
            above=LOGIT_DAMAGE,
            critical_above=LOGIT_DIVERGENCE,
            inherit=True,
            growth=INHERITED_GROWTH,
            name="attention/logit-range",
        ),
        Forecast(
            "attention/logit_range",
            limit=LOGIT_DAMAGE,
            min_samples=FORECAST_SAMPLES,
            persistence=FORECAST_PERSISTENCE,
            name="attention/logit-range-to-damage",
        ),
        Forecast(
            "attention/logit_range",
            limit=LOGIT_DIVERGENCE,
            min_samples=FORECAST_SAMPLES,
            persistence=FORECAST_PERSISTENCE,
            name="attention/logit-range-to-divergence",
        ),
        Threshold(
            "attention/max_logit",
            above=RAW_LOGIT_PRECISION,
            severity="info",
            name="attention/max-logit-precision",
        ),
        Spike(
            "gradient/norm",
            factor=SPIKE_FACTOR,
            z=SPIKE_Z,
            window=SPIKE_WINDOW,
            otherwise="gradient/norm_applied",
            name="gradient/norm-spike",
        ),
        Growth(
            "attention/query_norm",
            factor=ATTENTION_INPUT_GROWTH,
            severity="info",
            name="attention/query-norm-growth",
        ),
        Growth(
            "attention/key_norm",
            factor=ATTENTION_INPUT_GROWTH,
            severity="info",
            name="attention/key-norm-growth",
        ),
        OutputDrift(),
        Threshold(
            "optimizer/grad_rms_over_eps",
            below=EPSILON,
            critical_below=EPSILON_CRITICAL,
            share=0.5,
            persistence=3,
            name="optimizer/epsilon",
        ),
        Threshold(
            "optimizer/grad_rms_over_eps",
            below=EPSILON,
            fallen_from=EPSILON_FALLEN_FROM,
            persistence=3,
            name="optimizer/fallen-to-epsilon",
        ),
        StaleSecondMoment(above=STALE_MOMENT, share=0.0, severity="warning"),
        Threshold(
            "optimizer/update_ratio",
            above=UPDATE_RATIO,
            share=0.5,
            persistence=3,
            waits=True,
            name="optimizer/update-ratio",
        ),
        Growth(
            "optimizer/update_ratio",
            factor=UPDATE_GROWTH,
            share=0.5,
            settled=True,
            name="optimizer/update-growth",
        ),
        Threshold(
            "optimizer/skipped",
            above=0.5,
            persistence=SCALER_PATIENCE,
            name="optimizer/skipped",
        ),
        Growth(
            "gradient/norm",
            factor=GRADIENT_GROWTH,
            samples=GRADIENT_GROWTH_STEPS,
            persistence=GRADIENT_GROWTH_STEPS,
            settled=True,
            severity="info",
            name="gradient/norm-growth",
        ),
        Threshold(
            "gradient/clip_rate",
            above=CLIPPED,
            persistence=CLIPPED_SAMPLES,
            severity="info",
            name="gradient/clip-rate",
        ),
        Vanishing(),
        Threshold(
            "activation/growth_exponent",
            above=GROWTH_EXPONENT,
            persistence=2,
            name="activation/growth-exponent",
        ),
        Growth(
            "activation/rms",
            factor=ACTIVATION_GROWTH,
            share=0.5,
            settled=True,
            warns_with="output/log_z",
            name="activation/growth",
        ),
        Threshold(
            "activation/zero_fraction",
            above=DEAD_UNITS,
            persistence=3,
            name="activation/dead-units",
        ),
        Spike("loss/value", factor=LOSS_FACTOR, z=LOSS_Z, window=SPIKE_WINDOW, name="loss/spike"),
        StructuralZeros(),
        Ungraded(),
        Unchanged(),
        FrozenChanged(),
        Owners(),
        ReplicasDiffer(),
    ]
