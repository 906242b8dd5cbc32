"""The rules that judge a run by default. Every number has its source beside it.

*Tuning runs* are those of ``benchmarks/early_warning`` that rules may be tuned on: byte-level GPTs and MLPs of 20,000
to 150,000 parameters, 180 of them healthy. Rules are judged on others.
"""

from __future__ import annotations

from dataclasses import dataclass

from traindiag.rules.alive import StructuralZeros
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.loss_surge import LossSurge
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.plasticity import EarlyLoss, LostPlasticity, PlasticityPlateau
from traindiag.rules.resumed import OptimizerStateLost
from traindiag.rules.rule import Rule
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.spike import Spike
from traindiag.rules.stability import TaskGap
from traindiag.rules.threshold import Threshold
from traindiag.rules.vanishing import Vanishing
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded

_PROXIES = "Wortsman et al. 2023, arXiv 2309.14322"
_TUNING = "tuning runs of the early-warning benchmark"
_CONTINUAL_RUNS = "tuning runs of a byte-level Transformer from English to Python and of rotated digits"
_INVARIANT = "an invariant: TrainCheck (Jiang et al. 2025, OSDI)"

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

SPIKE_RISING = 3
"""The same four values climb from step to step, each at least twice the one before."""

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

LOSS_LEFT = 0.02
"""Share of the first loss below which small gradients are those of a model that has learned what there is to learn.
Chosen, not measured: classifiers of the tuning runs end between 0.1 % and 1 %."""

STALE_MOMENT = 5.0
"""RMS_t of 2.3 came before 28 of 30 loss spikes of arXiv 2304.13013, and is met by one step in a thousand of healthy
small runs (8 alarms in 10,000 steps at beta2 = 0.95). Five is beyond any of them, and beyond what beta2 = 0.95
allows."""

UPDATE_RATIO = 0.1
"""The median tensor changes by a tenth of itself in an update. TheDeepChecker's band for log10 is -4 to -1; healthy
tuning runs pass it during the first ten steps at most."""

UPDATE_GROWTH = 2.5
"""The median update has grown so many times against the weights since warm-up: a learning rate that was raised, or
weights that no longer grow with it. 5 of 342 healthy tuning runs reach twofold, none this."""

GRADIENT_GROWTH = 4.0
GRADIENT_GROWTH_LOOKS = 5
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


SOFT_DIVERGENCE = 1.0
SOFT_DIVERGENCE_CRITICAL = 2.0
SOFT_DIVERGENCE_LOOKS = 2
"""No return is larger than R_max / (1 - gamma): van Hasselt et al. 2018, arXiv 1812.02648. Runs that learn well pass
it, one by 1.4 times, so passing it is a warning; twice is ours."""


@dataclass(frozen=True)
class Described:
    """A default rule with what there is to say of it.

    Args:
        rule: The rule.
        says: What it watches for, in a few words.
        source: Where its numbers come from.
    """

    rule: Rule
    says: str
    source: str


def default_rules() -> list[Rule]:
    """New rules of the default pack.

    Example:
        >>> [rule.name for rule in default_rules()][:2]
        ['nonfinite', 'attention/logit-range']
    """
    return [described.rule for described in described_rules()]


def described_rules() -> list[Described]:
    """New rules of the default pack, each with a word on what it is for and where its numbers come from."""
    return [
        Described(
            NonFinite(scaler_patience=SCALER_PATIENCE),
            "anything that is NaN or infinite; the loss scaler may skip a few steps",
            "no number to choose; the scaler's patience follows from its initial scale of 2^16",
        ),
        Described(
            Threshold(
                "attention/logit_range",
                above=LOGIT_DAMAGE,
                critical_above=LOGIT_DIVERGENCE,
                inherit=True,
                growth=INHERITED_GROWTH,
                name="attention/logit-range",
            ),
            "attention logits so large that the loss gets worse, or that runs diverged",
            f"{_PROXIES} appendix E.1 and section 3.1.1",
        ),
        *(
            Described(
                Forecast(
                    "attention/logit_range",
                    limit=limit,
                    min_samples=FORECAST_SAMPLES,
                    persistence=FORECAST_PERSISTENCE,
                    name=name,
                ),
                "when attention logits will be that large",
                f"{_PROXIES}, as above; samples and persistence from 14 small healthy runs",
            )
            for limit, name in (
                (LOGIT_DAMAGE, "attention/logit-range-to-damage"),
                (LOGIT_DIVERGENCE, "attention/logit-range-to-divergence"),
            )
        ),
        Described(
            Threshold(
                "attention/max_logit",
                above=RAW_LOGIT_PRECISION,
                severity="info",
                name="attention/max-logit-precision",
            ),
            "raw logits that low precision cannot tell apart",
            "one unit in the last place of bfloat16",
        ),
        *(
            Described(
                Growth(
                    f"attention/{what}_norm",
                    factor=ATTENTION_INPUT_GROWTH,
                    severity="info",
                    name=f"attention/{what}-norm-growth",
                ),
                f"{what} norms that grow, which logits follow",
                f"{_PROXIES} appendix C; {_TUNING}",
            )
            for what in ("query", "key")
        ),
        Described(
            OutputDrift(),
            "output logits that drift while the target stands out no better",
            f"{_PROXIES} section 3.1.2; {_TUNING}",
        ),
        Described(
            Threshold(
                "optimizer/grad_rms_over_eps",
                below=EPSILON,
                critical_below=EPSILON_CRITICAL,
                share=0.5,
                left=LOSS_LEFT,
                persistence=3,
                name="optimizer/epsilon",
            ),
            "gradients of most tensors below the optimizer's epsilon",
            f"{_PROXIES} section 3.4",
        ),
        Described(
            Threshold(
                "optimizer/grad_rms_over_eps",
                below=EPSILON,
                fallen_from=EPSILON_FALLEN_FROM,
                left=LOSS_LEFT,
                persistence=3,
                name="optimizer/fallen-to-epsilon",
            ),
            "the gradient of a tensor fallen to epsilon",
            f"{_PROXIES} section 3.4",
        ),
        Described(
            StaleSecondMoment(above=STALE_MOMENT, share=0.0, severity="warning"),
            "gradients that have outgrown their second moment, 1 to 8 steps before a loss spike",
            f"Wortsman et al. 2023, arXiv 2304.13013; {_TUNING}",
        ),
        Described(
            Threshold(
                "optimizer/update_ratio",
                above=UPDATE_RATIO,
                share=0.5,
                persistence=3,
                waits=True,
                name="optimizer/update-ratio",
            ),
            "updates that are large against the weights",
            f"TheDeepChecker's band; {_TUNING}",
        ),
        Described(
            Growth(
                "optimizer/update_ratio",
                factor=UPDATE_GROWTH,
                share=0.5,
                settled=True,
                name="optimizer/update-growth",
            ),
            "updates that have grown since warm-up",
            _TUNING,
        ),
        Described(
            Threshold(
                "optimizer/skipped",
                above=0.5,
                persistence=SCALER_PATIENCE,
                name="optimizer/skipped",
            ),
            "updates that do not come, one after the other",
            "a loss scale of 2^16 is used up after 16",
        ),
        Described(
            Spike(
                "gradient/norm",
                factor=SPIKE_FACTOR,
                z=SPIKE_Z,
                window=SPIKE_WINDOW,
                rising=SPIKE_RISING,
                otherwise="gradient/norm_applied",
                name="gradient/norm-spike",
            ),
            "a jump of the gradient norm, most pass without harm; a warning while it climbs",
            "BLOOM-176B's first loss spike; noise of healthy small runs",
        ),
        Described(
            Growth(
                "gradient/norm",
                factor=GRADIENT_GROWTH,
                samples=GRADIENT_GROWTH_LOOKS,
                persistence=GRADIENT_GROWTH_LOOKS,
                every=10,
                settled=True,
                severity="info",
                name="gradient/norm-growth",
            ),
            "a gradient norm that has grown since warm-up and stays",
            f"OLMo 2, arXiv 2501.00656 section 3; {_TUNING}",
        ),
        Described(
            Threshold(
                "gradient/clip_rate",
                above=CLIPPED,
                persistence=CLIPPED_SAMPLES,
                severity="info",
                name="gradient/clip-rate",
            ),
            "clipping that has become the rule",
            "Deep Learning Tuning Playbook, on gradient clipping",
        ),
        Described(
            Vanishing(),
            "next to no gradient in the first block of a stack",
            "AutoTrainer (Zhang et al. 2021, ICSE)",
        ),
        Described(
            Threshold(
                "activation/growth_exponent",
                above=GROWTH_EXPONENT,
                persistence=2,
                name="activation/growth-exponent",
            ),
            "a residual stream that explodes over depth",
            f"OLMo 2, arXiv 2501.00656 section 3; {_TUNING}",
        ),
        Described(
            Growth(
                "activation/rms",
                factor=ACTIVATION_GROWTH,
                share=0.5,
                settled=True,
                warns_with="output/log_z",
                name="activation/growth",
            ),
            "a residual stream that grows over time",
            _TUNING,
        ),
        Described(
            Threshold(
                "activation/zero_fraction",
                above=DEAD_UNITS,
                persistence=3,
                name="activation/dead-units",
            ),
            "blocks whose units are nearly all dead",
            f"AutoTrainer (Zhang et al. 2021, ICSE); {_TUNING}",
        ),
        Described(
            Spike("loss/value", factor=LOSS_FACTOR, z=LOSS_Z, window=SPIKE_WINDOW, name="loss/spike"),
            "a jump of the loss: confirmation of what other signals say",
            "robust z of six healthy language models",
        ),
        Described(
            LossSurge(),
            "a loss that gives back nearly half of what was learned in one step",
            _TUNING,
        ),
        Described(
            TaskGap(),
            "an old task that falls after a shift, and whether it comes back",
            f"stability gap: arXiv 2205.13452; {_CONTINUAL_RUNS}",
        ),
        Described(
            EarlyLoss(),
            "most active units of a critic lost early, and not coming back",
            "Ma et al. 2024, arXiv 2310.07418 section 5; the share of 0.6 is ours: runs that learn keep 0.69",
        ),
        Described(
            LostPlasticity(),
            "several signs of lost plasticity at once: units, ranks, fit, trainability, weight norm",
            "Lyle et al. 2023, arXiv 2303.01486: no sign holds everywhere; limits in `rules/plasticity_panel.py`",
        ),
        Described(
            PlasticityPlateau(),
            "active units that stay at a healthy level, a note: the replay ratio may be raised",
            "Ma et al. 2024, arXiv 2310.07418 section 6; the level of 0.8 is ours",
        ),
        Described(
            Threshold(
                "plasticity/q_bound_ratio",
                above=SOFT_DIVERGENCE,
                critical_above=SOFT_DIVERGENCE_CRITICAL,
                persistence=SOFT_DIVERGENCE_LOOKS,
                name="plasticity/soft-divergence",
            ),
            "values that no return can have",
            "van Hasselt et al. 2018, arXiv 1812.02648",
        ),
        Described(
            OptimizerStateLost(),
            "a resumed job whose optimizer begins with an empty second moment",
            "RMS_t is exactly 1 at an Adam optimizer's first update",
        ),
        Described(
            StructuralZeros(), "parameters that get no gradient by construction", "round-off measured in float32"
        ),
        Described(Ungraded(), "parameters that no gradient reaches", _INVARIANT),
        Described(Unchanged(), "parameters with a gradient that do not change", _INVARIANT),
        Described(FrozenChanged(), "frozen parameters that change", _INVARIANT),
        Described(Owners(), "trainable parameters in no optimizer, or in two", _INVARIANT),
        Described(ReplicasDiffer(), "ranks that hold different parameters", _INVARIANT),
    ]
