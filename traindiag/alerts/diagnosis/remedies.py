"""Remedies that several failures share, with the values of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from traindiag.alerts.alert import Remedy
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.wording import number

PROXIES = "Wortsman et al. 2023, arXiv 2309.14322"
SPIKES = "Wortsman et al. 2023, arXiv 2304.13013"
PALM = "Chowdhery et al. 2022, arXiv 2204.02311"
OLMO2 = "OLMo 2, arXiv 2501.00656"

WARMUP_SHARE = 0.05
"""Warm-up of the runs of arXiv 2309.14322: 5,000 of 100,000 steps."""

CLIP = 1.0
"""Global norm that the same runs clip at."""

LOWER_LR = 0.3
"""One place down the 1-3-10 ladder of learning rates that the same runs are laid out on."""

BETA2 = 0.95
"""Second-moment decay of the same runs; arXiv 2304.13013 finds fewer spikes at 0.95-0.98 than above."""

BACK = 100
"""Steps before a spike at which PaLM went back to a checkpoint (arXiv 2204.02311 section 5.1)."""


def lower_lr(run: RunInfo, *, at_most: float = math.inf, source: str = f"{PROXIES} section 3.1.1") -> list[Remedy]:
    """A place down the ladder for every optimizer, or further where ``at_most`` asks for it.

    Example:
        >>> adam = OptimizerInfo("adam", "AdamW", {"lr": 0.001}, peak_lr=0.1)
        >>> lower_lr(RunInfo(optimizers=(adam,)))[0].text
        'Lower the peak learning rate from 0.1 to 0.03.'
    """
    changes: dict[str, Any] = {}
    words = []
    for optimizer in run.optimizers:
        peak = peak_lr(optimizer)
        if peak is None:
            continue
        lower = float(f"{min(LOWER_LR * peak, at_most):.0e}")
        changes[key(run, optimizer, "lr")] = lower
        words.append(f"from {peak:g} to {lower:g}" + (f" ({optimizer.name})" if len(run.optimizers) > 1 else ""))
    how = " " + ", ".join(words) if words else " to a third"
    return [Remedy(f"Lower the peak learning rate{how}.", changes, "restart", source)]


def longer_warmup(run: RunInfo) -> list[Remedy]:
    """Nothing where most of the run would be warm-up."""
    source = f"{PROXIES} section 3.2: longer warm-up lowers the sensitivity to the learning rate"
    if run.length is None:
        longer = None if not run.warmup else 2 * run.warmup
    else:
        longer = max(math.ceil(WARMUP_SHARE * run.length), 2 * (run.warmup or 0))
        if longer > run.length // 2:
            return []
    if longer is None:
        return [Remedy(f"Warm up over the first {WARMUP_SHARE:.0%} of the run.", {}, "next run", source)]
    instead = f" instead of {run.warmup}" if run.warmup else ""
    return [Remedy(f"Warm up over {longer} steps{instead}.", {"warmup": longer}, "next run", source)]


def clip(run: RunInfo) -> list[Remedy]:
    """Nothing where gradients are clipped already."""
    if run.clip is not None:
        return []
    source = f"{PROXIES}: the setting of its runs"
    return [Remedy(f"Clip gradients at a global norm of {number(CLIP)}.", {"clip": CLIP}, "restart", source)]


def lower_beta2(run: RunInfo, optimizers: Iterable[OptimizerInfo]) -> list[Remedy]:
    """For those whose second moment remembers longer than it should."""
    remedies = []
    for optimizer in optimizers:
        betas = optimizer.settings.get("betas")
        if isinstance(betas, (list, tuple)) and len(betas) == 2 and float(betas[1]) > BETA2:
            text = f"Lower beta2 of {optimizer.kind} from {betas[1]:g} to {BETA2:g}: its second moment lags behind."
            change = {key(run, optimizer, "betas"): [betas[0], BETA2]}
            remedies.append(Remedy(text, change, "restart", f"{SPIKES}: fewer spikes at a lower beta2"))
    return remedies


def query_key_norm(run: RunInfo) -> list[Remedy]:
    """Nothing where queries and keys are normalised already."""
    if run.normalisation.get("query_key", 0):
        return []
    text = "Normalise queries and keys (LayerNorm or RMSNorm on each head) before their product."
    source = f"{PROXIES} section 3.1.1: trains 1.2B parameters at a learning rate of 0.3"
    return [Remedy(text, {"model.query_key_norm": True}, "next run", source)]


def go_back(step: int, why: str = "weights updated with such a gradient do not recover") -> Remedy:
    """To a checkpoint from before a step."""
    return Remedy(f"Stop and go back to a checkpoint from before step {step}: {why}.", when="now")


def skip_batches(step: int) -> Remedy:
    """Where the data may be to blame."""
    where = f"near step {step - BACK} and skip the batches up to step {step + BACK}"
    if step < 2 * BACK:
        where = f"from before step {step} and skip the batches around it"
    text = f"If the loss does not come back: resume from a checkpoint {where}."
    return Remedy(text, when="restart", source=f"{PALM} section 5.1")


def peak_lr(optimizer: OptimizerInfo) -> float | None:
    """The largest learning rate of the schedule, or the one that there is."""
    peak = optimizer.peak_lr if optimizer.peak_lr is not None else optimizer.settings.get("lr")
    return float(peak) if isinstance(peak, (int, float)) and peak > 0 else None


def key(run: RunInfo, optimizer: OptimizerInfo, setting: str) -> str:
    """``optimizer.lr``, or ``optimizer.<name>.lr`` where there are several."""
    return f"optimizer.{optimizer.name}.{setting}" if len(run.optimizers) > 1 else f"optimizer.{setting}"
