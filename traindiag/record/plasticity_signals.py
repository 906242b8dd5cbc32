"""Signals of plasticity: what tells whether a network can still learn. Part of the catalogue."""

from __future__ import annotations

from dataclasses import replace

from traindiag.record.signal import Signal

_MA = "Ma et al. 2024, arXiv 2310.07418"
_SOKAR = "Sokar et al. 2023, arXiv 2302.12902"
_DOHARE = "Dohare et al. 2024, Nature 632"
_LYLE_RANK = "Lyle et al. 2022, arXiv 2204.09560"
_LYLE = "Lyle et al. 2023, arXiv 2303.01486"
_CAUSES = "Lyle et al. 2024, arXiv 2402.18762"
_HASSELT = "van Hasselt et al. 2018, arXiv 1812.02648"

_LAYER = ("module", "layer")
_MODULE = ("module",)

_SIGNALS: tuple[Signal, ...] = (
    Signal(
        "plasticity/updates",
        _MODULE,
        "updates of the optimizer that owns the module, when it was looked at",
        formula="count",
        unit="updates",
        source="the axis of all plasticity: neither environment steps nor batches",
    ),
    Signal(
        "plasticity/fau",
        _LAYER,
        "fraction of active units of one layer, on the same states throughout the run",
        formula="mean over states and units of [a > 0]; smooth ones: [a in no tail where |phi'| < 0.02 max |phi'|]",
        worst="min",
        source=f"{_MA} section 4; the rule for smooth activations is ours",
    ),
    Signal(
        "plasticity/fau_pooled",
        _MODULE,
        "fraction of active units of a module, wide layers counting more",
        formula="sum over layers of active (state, unit) pairs / sum over layers of all pairs",
        worst="min",
        source=f"{_MA} section 4, pooled over layers and states as in the authors' code",
    ),
    Signal(
        "plasticity/fau_fresh",
        _MODULE,
        "the same on states of the last few updates",
        formula="sum over layers of active (state, unit) pairs / sum over layers of all pairs",
        worst="min",
        source=f"{_MA} section 4: of the replay batch",
    ),
    Signal(
        "plasticity/dead",
        _LAYER,
        "share of units that are active on less than 1 % of the states",
        formula="mean_i [p_i < 0.01], p_i = share of states on which unit i is active",
        source=f"{_DOHARE}: units active less than 1 % of the time",
    ),
    Signal(
        "plasticity/zombie",
        _LAYER,
        "share of a rectifier's units that are active on more than 99 % of the states: they have become linear",
        formula="mean_i [p_i > 0.99]",
        source=f"{_CAUSES}: linearised units",
    ),
    Signal(
        "plasticity/dormant_025",
        _LAYER,
        "share of units that are 0.025-dormant",
        formula="mean_i [s_i <= 0.025], s_i = E|h_i| / mean_k E|h_k|; a feature map of a convolution is one unit",
        source=f"{_SOKAR}: the stricter of its two thresholds, the usual one in code",
    ),
    Signal(
        "plasticity/dormant_100",
        _LAYER,
        "share of units that are 0.1-dormant",
        formula="mean_i [s_i <= 0.1], s_i = E|h_i| / mean_k E|h_k|",
        source=f"{_SOKAR}: default of the paper",
    ),
    Signal(
        "plasticity/saturation",
        _LAYER,
        "share of (state, unit) pairs in the flat tails of a smooth or bounded activation",
        formula="mean [a is in a tail where |phi'(a)| < 0.02 max |phi'|]",
        source="ours; for tanh it is |h| > 0.99, as in published code",
    ),
    Signal(
        "plasticity/dead_overlap",
        _MODULE,
        "how much the dead units of two looks in a row are the same ones",
        formula="|X and Y| / min(|X|, |Y|)",
        source=f"{_SOKAR}: dormant units stay dormant",
    ),
    Signal(
        "plasticity/srank_99",
        _LAYER,
        "number of singular values that carry 99 % of their sum, of the last hidden features, uncentred",
        formula="min k: sum_(i<=k) s_i / sum_i s_i >= 0.99",
        worst="min",
        positive=True,
        source="Kumar et al. 2021, arXiv 2010.14498, delta = 0.01; called stable rank by some",
    ),
    Signal(
        "plasticity/effective_rank",
        _LAYER,
        "exponential of the entropy of the singular values of the last hidden features, uncentred",
        formula="exp(-sum_i p_i ln p_i), p_i = s_i / sum s",
        worst="min",
        positive=True,
        source="Roy and Vetterli 2007, EUSIPCO",
    ),
    Signal(
        "plasticity/feature_rank",
        _LAYER,
        "number of singular values above 0.01 of the last hidden features over the root of their number",
        formula="#{i: s_i(H / sqrt n) > 0.01}; not normalised, so that features going to zero are seen",
        worst="min",
        source=f"{_LYLE_RANK}, epsilon = 0.01",
    ),
    Signal(
        "plasticity/weight_norm_ratio",
        _MODULE,
        "norm of a module's parameters against the norm that they had at first; a witness, no verdict",
        formula="|w| / |w at first|",
        positive=True,
        source=f"{_CAUSES}: norm growth sharpens the loss",
    ),
    Signal(
        "plasticity/preactivation_norm",
        _LAYER,
        "mean norm of what enters the activation",
        formula="mean over states of |a|_2",
        positive=True,
        source="Moalla et al. 2024, arXiv 2405.00662 section 3: grows where the feature norm stays flat",
    ),
    Signal(
        "plasticity/q_max_abs",
        _MODULE,
        "largest absolute value that a critic gives to fresh states",
        formula="max over states, actions and heads of |Q|",
        positive=True,
        source=_HASSELT,
    ),
    Signal(
        "plasticity/q_mean",
        _MODULE,
        "mean value that a critic gives to fresh states",
        formula="mean over states, actions and heads of Q",
        source=_HASSELT,
    ),
    Signal(
        "plasticity/q_bound_ratio",
        _MODULE,
        "largest absolute value against what any return can be; beyond 1 is soft divergence",
        formula="max |Q| (1 - gamma) / R_max",
        positive=True,
        source=f"{_HASSELT}: with |r| <= 1, |Q*| <= 1 / (1 - gamma)",
    ),
    Signal(
        "plasticity/twin_gap",
        _MODULE,
        "how far the members of a twin or an ensemble are apart on fresh states",
        formula="mean over states and actions of (max_k Q_k - min_k Q_k)",
        positive=True,
        source="members that learn the same disagree where they do not generalise",
    ),
    Signal(
        "plasticity/churn",
        _MODULE,
        "share of states whose greedy action is another one than at the look before",
        formula="mean over states of [argmax_a Q_t(s, a) != argmax_a Q_t-1(s, a)]",
        source="Schaul et al. 2022, arXiv 2206.00730; high early in every run",
    ),
    Signal(
        "plasticity/output_change",
        _MODULE,
        "how far outputs have moved since the look before, on the same states",
        formula="mean |y_t - y_t-1| / mean |y_t-1|",
        positive=True,
        source="the value churn of Tang and Berseth 2024, arXiv 2409.04792, as a share",
    ),
    Signal(
        "plasticity/explained_variance",
        _MODULE,
        "share of the variance of returns that a value function explains; below 0 it is worse than a constant",
        formula="1 - Var(R - V) / Var(R)",
        worst="min",
        source="as in on-policy code of Stable-Baselines3",
    ),
    Signal(
        "plasticity/trainability",
        _MODULE,
        "loss that the module reaches on random targets against the one that its first weights reach: above 1 it "
        "learns less than it could",
        formula="mean over targets of loss(from now) / loss(from the first weights), after the same few steps",
        positive=True,
        source=f"{_LYLE}: plasticity by its definition",
    ),
)

PLASTICITY_SIGNALS = tuple(replace(signal, lane="active") for signal in _SIGNALS)
"""All of them are measured by forward passes of their own."""
