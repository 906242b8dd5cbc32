"""The rules that judge a run by default. Every number has its source beside it."""

from __future__ import annotations

from traindiag.rules.alive import StructuralZeros
from traindiag.rules.forecast import Forecast
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.rule import Rule
from traindiag.rules.spike import Spike
from traindiag.rules.threshold import Threshold
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded

LOGIT_DAMAGE = 1e3
"""Loss gets worse from about here. arXiv 2309.14322 appendix E.1, where scaled queries and keys are transplanted
into a trained model. Of 25 small runs that degraded, 16 passed it before their loss showed
it; of 66 healthy ones 3 passed it."""

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
"""The fourth sample can speak: with three samples and two in a row, growth that reaches 1e3 between
steps 50 and 60 is told at step 40 when every tenth step is sampled, and no healthy run of 14 was (learning rates
1e-3 to 3e-2, 400 and 800 steps, sampled every 5th and every 10th step)."""

SPIKE_FACTOR = 4.0
"""The gradient norm of BLOOM-176B rose fourfold four steps before its first loss spike (.24, .95, 2.4, 16, 145); no
value of the healthy small runs above reaches it."""

SPIKE_Z = 4.0
"""On log-normal noise of sigma 0.35 around a falling norm both conditions together held once in 20,000 steps by
chance, and a tenfold jump was missed in at most 12 of 100 cases at the worst place, none at sigma 0.15."""

SPIKE_WINDOW = 100
"""Steps that the usual deviation is taken from; public run monitors use 100 to 128."""

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
        StructuralZeros(),
        Ungraded(),
        Unchanged(),
        FrozenChanged(),
        Owners(),
        ReplicasDiffer(),
    ]
