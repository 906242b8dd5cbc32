"""Every built-in signal, in one table that needs no torch: rules, replay and the docs read it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from traindiag.record.plasticity_signals import PLASTICITY_SIGNALS
from traindiag.record.signal import Signal
from traindiag.record.stability_signals import STABILITY

_PROXIES = "Wortsman et al. 2023, arXiv 2309.14322"
_TRAINCHECK = "an invariant of correct training, as in TrainCheck (Jiang et al., OSDI 2025)"
_STABLE = "Wortsman et al. 2023, arXiv 2304.13013"

SIGNALS: tuple[Signal, ...] = (
    Signal(
        "attention/max_logit",
        ("layer", "head"),
        "largest attention logit found; a value that occurred",
        formula="max over observed query rows and unmasked keys of q.k * scale + mask",
        source=f"{_PROXIES} section 3.1.1",
    ),
    Signal(
        "attention/max_logit_bound",
        ("layer", "head"),
        "what the largest attention logit cannot exceed; equal to max_logit when that is exact",
        formula="log-sum-exp of the rows not observed, or max|q| max|k| |scale| + max mask without it",
        source="log-sum-exp is never below the maximum; Cauchy-Schwarz",
    ),
    Signal(
        "attention/logit_range",
        ("layer", "head"),
        "row maximum less row mean over unmasked keys, the largest observed: what softmax feels",
        formula="max over observed rows of (max_j z_ij - mean_j z_ij)",
        positive=True,
        source=f"{_PROXIES} section 3.1.1; free of shifts that softmax cancels",
    ),
    Signal(
        "attention/entropy",
        ("layer", "head"),
        "mean entropy of the attention weights over evenly spaced rows",
        formula="mean_i -sum_j p_ij log p_ij",
        unit="nat",
        worst="min",
        source="Zhai et al. 2023, arXiv 2303.06296",
    ),
    Signal(
        "attention/query_norm",
        ("layer", "head"),
        "root mean square over tokens of the query norm",
        formula="sqrt(mean_i |q_i|^2)",
        positive=True,
        source=f"{_PROXIES} appendix C",
    ),
    Signal(
        "attention/key_norm",
        ("layer", "head"),
        "root mean square over tokens of the key norm",
        formula="sqrt(mean_j |k_j|^2)",
        positive=True,
        source=f"{_PROXIES} appendix C",
    ),
    Signal(
        "gradient/norm",
        ("optimizer",),
        "global gradient norm before clipping",
        formula="sqrt(sum over parameters of |g|^2)",
        lane="fast",
        clock="fast",
        positive=True,
        source="OLMo 2, arXiv 2501.00656 section 3",
    ),
    Signal(
        "gradient/norm_applied",
        ("optimizer",),
        "global gradient norm as the optimizer used it, after any clipping; at samples only where norm is there too",
        formula="sqrt(sum over parameters of |g|^2)",
        lane="fast",
        clock="fast",
        positive=True,
        source="what clipping leaves of norm; alone where the loop does not show gradients before clipping",
    ),
    Signal(
        "gradient/block_norm",
        ("optimizer", "block"),
        "gradient norm of one block before clipping; embeddings, head and the like have cells of their own",
        formula="sqrt(sum over the parameters of a block of |g|^2)",
        lane="fast",
        clock="fast",
        positive=True,
        source="vanishing and exploding gradients go with depth: OLMo 2, arXiv 2501.00656 section 3",
    ),
    Signal(
        "gradient/parameter_norm",
        ("optimizer", "parameter"),
        "gradient norm of one parameter before clipping",
        formula="|g|",
        lane="fast",
        clock="fast",
        positive=True,
        source="a non-finite entry names the tensor",
    ),
    Signal(
        "loss/value",
        ("optimizer",),
        "training loss, mean over micro-batches and ranks",
        formula="mean loss",
        lane="fast",
        clock="fast",
        source="confirmation, never prediction",
    ),
    Signal(
        "activation/rms",
        ("layer",),
        "root mean square of what a block returns: the size of the residual stream",
        formula="sqrt(mean x^2)",
        positive=True,
        source=f"{_PROXIES} section 3.4",
    ),
    Signal(
        "activation/max",
        ("layer",),
        "largest absolute value; large ones on few features are normal in trained models, their growth is not",
        formula="max |x|",
        positive=True,
        source="Sun et al. 2024, arXiv 2402.17762",
    ),
    Signal(
        "activation/kurtosis",
        ("layer",),
        "outlier features: 1 where all features are equally large, the width where one carries everything",
        formula="E_j[(E_a x_aj^2)^2] / (E_j E_a x_aj^2)^2 over features j and evenly spaced rows a",
        positive=True,
        source="He et al. 2024, arXiv 2405.19279",
    ),
    Signal(
        "activation/zero_fraction",
        ("layer",),
        "share of values that are exactly zero, over evenly spaced rows: dead units where it stays near 1",
        formula="mean [x = 0]",
        source="dead units of rectifiers; other layers have none",
    ),
    Signal(
        "activation/nonfinite",
        ("layer",),
        "NaN and infinite values found in evenly spaced rows; at least 1 if any value is",
        formula="sum [x is NaN or infinite]",
        clock="fast",
        source="the first layer in forward order is where to look",
    ),
    Signal(
        "activation/growth_exponent",
        ("layer",),
        "growth of the RMS over the depth of a stack of blocks; 0 is best",
        formula="log(rms of the last block / rms of the first) / number of blocks",
        source="OLMo 2, arXiv 2501.00656 section 3",
    ),
    Signal(
        "output/log_z",
        ("site",),
        "mean of log Z over up to 128 tokens of a cross-entropy call; far from zero as output logits drift",
        formula="mean_t log sum_c exp(logit_tc)",
        unit="nat",
        source=f"{_PROXIES} section 3.1.2",
    ),
    Signal(
        "output/log_z_max_abs",
        ("site",),
        "largest |log Z| of these tokens",
        formula="max_t |log sum_c exp(logit_tc)|",
        unit="nat",
        positive=True,
        source=f"{_PROXIES} section 3.1.2",
    ),
    Signal(
        "output/z_loss",
        ("site",),
        "mean of (log Z)^2, what a z-loss of weight one would add to the loss",
        formula="mean_t (log sum_c exp(logit_tc))^2",
        positive=True,
        source=f"{_PROXIES} section 3.1.2; Chowdhery et al. 2022, arXiv 2204.02311 section 5",
    ),
    Signal(
        "output/logit_mean",
        ("site",),
        "mean output logit, which cross-entropy alone leaves free",
        formula="mean_t mean_c logit_tc",
        worst="min",
        source=f"{_PROXIES} section 3.1.2; output logits become very negative",
    ),
    Signal(
        "output/logit_max",
        ("site",),
        "largest output logit of these tokens",
        formula="max_tc logit_tc",
        source=f"{_PROXIES} section 3.1.2",
    ),
    Signal(
        "output/logit_min",
        ("site",),
        "smallest output logit of these tokens",
        formula="min_tc logit_tc",
        worst="min",
        source=f"{_PROXIES} section 3.1.2; output logits become very negative",
    ),
    Signal(
        "output/target_z_score",
        ("site",),
        "how far the target stands out of its token's logits; free of their shift and scale",
        formula="mean_t (logit_t,target - mean_c logit_tc) / std_c logit_tc",
        worst="min",
        source="separates drift of the logits, which log Z shows, from what is learnt",
    ),
    Signal(
        "output/overconfidence",
        ("site",),
        "loss less the entropy of the prediction: above zero, smaller logits would be better ones",
        formula="mean_t (-log p_t,target - H(p_t)) = d loss / d log scale of the logits",
        unit="nat",
        source="the derivative of cross-entropy by a temperature (Guo et al. 2017, arXiv 1706.04599 section 4.2)",
    ),
    # -- gradients, parameter by parameter, at samples
    Signal(
        "gradient/rms",
        ("optimizer", "parameter"),
        "root mean square of a parameter's gradient before clipping, over evenly spaced scalars",
        formula="sqrt(mean g^2)",
        positive=True,
        worst="min",
        source=f"{_PROXIES} section 3.4",
    ),
    Signal(
        "gradient/zero_fraction",
        ("optimizer", "parameter"),
        "share of a parameter's gradient that is exactly zero, over evenly spaced scalars",
        formula="mean [g == 0]",
        source="zero gradients tell dead units: AutoTrainer (Zhang et al. 2021, ICSE)",
    ),
    Signal(
        "gradient/clip_rate",
        ("optimizer",),
        "share of the last 30 sampled steps in which gradients were clipped",
        formula="mean [some |g| after < |g| before (1 - 1e-4)]",
        source="Deep Learning Tuning Playbook, on gradient clipping",
    ),
    # -- optimizers
    Signal(
        "optimizer/rms_t",
        ("optimizer", "parameter"),
        "gradient in units of the second moment: about 1 while that keeps up, at most 1 / sqrt(1 - beta2)",
        formula="sqrt(mean g^2 / max(v, eps^2)), v after the update and as the optimizer uses it",
        clock="fast",
        positive=True,
        source=_STABLE,
    ),
    Signal(
        "optimizer/sentinel_rms_t",
        ("optimizer", "parameter"),
        "the same of embedding, first and last block, at every step",
        formula="sqrt(mean g^2 / max(v, eps^2)), v after the update and as the optimizer uses it",
        lane="fast",
        clock="fast",
        positive=True,
        source=f"{_STABLE}: 1 to 8 steps before a loss spike",
    ),
    Signal(
        "optimizer/update_rms",
        ("optimizer", "parameter"),
        "root mean square change of a scalar in one update, learning rate and weight decay included",
        formula="sqrt(mean (p_after - p_before)^2)",
        positive=True,
        source=f"{_PROXIES} section 3.4",
    ),
    Signal(
        "optimizer/update_ratio",
        ("optimizer", "parameter"),
        "size of one update against the size of the weights before it",
        formula="sqrt(sum (p_after - p_before)^2 / sum p_before^2)",
        positive=True,
        source="limits in use: TheDeepChecker (log10 from -4 to -1), SageMaker Debugger",
    ),
    Signal(
        "optimizer/grad_rms_over_eps",
        ("optimizer", "parameter"),
        "gradient root mean square against the optimizer's epsilon; below 1 epsilon sets the size of updates",
        formula="sqrt(mean g^2) / eps",
        worst="min",
        positive=True,
        source=f"{_PROXIES} section 3.4",
    ),
    Signal(
        "optimizer/parameter_norm",
        ("optimizer", "parameter"),
        "norm of a parameter before the update, from evenly spaced scalars",
        formula="sqrt(size * mean p^2)",
        positive=True,
        source="weights that grow without bound are behind growing logits",
    ),
    Signal(
        "optimizer/skipped",
        ("optimizer",),
        "updates that gradients were ready for and that did not come",
        formula="updates announced - updates made",
        lane="fast",
        clock="fast",
        source="a loss scaler skips steps with overflowing gradients without a word",
    ),
    # -- wiring: flags, 1 where the name holds
    Signal(
        "wiring/ungraded",
        ("optimizer", "parameter"),
        "1 where a trainable tensor of an optimizer got no gradient in this step",
        formula="[no gradient in any update]",
        source=_TRAINCHECK,
    ),
    Signal(
        "wiring/unchanged",
        ("optimizer", "parameter"),
        "1 where a tensor with a gradient and a learning rate above 0 did not change",
        formula="[all p_after == p_before], where some g != 0 and lr > 0",
        source=_TRAINCHECK,
    ),
    Signal(
        "wiring/frozen_changed",
        ("parameter",),
        "1 where a frozen tensor is not what it was when it was last looked at",
        formula="[bits differ]",
        source=_TRAINCHECK,
    ),
    Signal(
        "wiring/owners",
        ("parameter",),
        "number of optimizers that own a trainable tensor; 1 is right",
        formula="sum over optimizers [tensor in its parameter groups]",
        worst="min",
        source=_TRAINCHECK,
    ),
    Signal(
        "wiring/replicas_differ",
        ("parameter",),
        "1 where ranks hold different bits of a replicated tensor",
        formula="[max over ranks of a checksum != its min]",
        source=_TRAINCHECK,
    ),
    *PLASTICITY_SIGNALS,
    *STABILITY,
)

BY_NAME: dict[str, Signal] = {s.name: s for s in SIGNALS}

ON_DEMAND = frozenset(s.family for s in SIGNALS if s.lane == "active")
"""Families that only monitors measure which a run must ask for."""


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` Did you mean 'x' or 'y'?`` for an error message, or nothing.

    Example:
        >>> near("attention/max_logits", BY_NAME)
        " Did you mean 'attention/max_logit' or 'attention/max_logit_bound'?"
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)[:2]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def check_signal(name: str, extra: Iterable[str] = ()) -> None:
    """Refuses a name that can only be a slip.

    Names of built-in families must exist; any other family is the user's own and may appear later.

    Raises:
        ValueError: With the nearest names.

    Example:
        >>> check_signal("attention/max_logit")
        >>> check_signal("reward/kl")
    """
    known = {*BY_NAME, *extra}
    if name in known:
        return
    if "/" not in name or not all(name.split("/", 1)):
        raise ValueError(f"a signal is named 'family/metric', got {name!r}.{near(name, known)}")
    family = name.split("/", 1)[0]
    ours = {n.split("/", 1)[0] for n in BY_NAME}
    misspelt = family != "logged" and difflib.get_close_matches(name, list(known), n=1, cutoff=0.88)
    if family in ours or misspelt:
        raise ValueError(f"there is no signal {name!r}.{near(name, known)}")
