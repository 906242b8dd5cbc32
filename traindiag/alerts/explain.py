"""What a verdict means and what to do about it, with the values of this run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from traindiag.alerts.alert import Remedy
from traindiag.record.catalogue import BY_NAME
from traindiag.record.frame import Frame
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.rule import Verdict
from traindiag.rules.wording import in_steps, number

_PROXIES = "Wortsman et al. 2023, arXiv 2309.14322"
_SPIKES = "Wortsman et al. 2023, arXiv 2304.13013"

WARMUP_SHARE = 0.05
"""Warm-up of the runs of arXiv 2309.14322: 5,000 of 100,000 steps."""

CLIP = 1.0
"""Global norm that the same runs clip at."""

LOWER_LR = 0.3
"""One place down the 1-3-10 ladder of learning rates that the same runs are laid out on."""

BETA2 = 0.95
"""Second-moment decay of the same runs; arXiv 2304.13013 finds fewer spikes at 0.95-0.98 than above."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The words of an alert."""

    title: str
    cause: str = ""
    ruled_out: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()


def explain(verdict: Verdict, frame: Frame) -> Explanation:
    """Chooses the explanation by what was found, so that rules of the user's own on built-in signals get it too.

    Example:
        >>> from traindiag.record.run_info import OptimizerInfo
        >>> run = RunInfo(optimizers=(OptimizerInfo("adam", "AdamW", {"lr": 0.1}),))
        >>> high = Verdict("logits", "threshold", "attention/logit_range", 40, value=1500.0, limit=1000.0)
        >>> [dict(r.change) for r in explain(high, Frame(40, "slow", {}, run)).remedies if "learning rate" in r.text]
        [{'optimizer.lr': 0.03}]
    """
    if verdict.kind == "nonfinite":
        return _nonfinite(verdict, frame)
    if verdict.signal in ("attention/max_logit", "attention/logit_range", "attention/max_logit_bound"):
        if verdict.kind == "threshold" and verdict.severity == "info":
            return _precision(verdict) if verdict.signal != "attention/logit_range" else _inherited(verdict)
        if verdict.kind in ("threshold", "forecast"):
            return _logit_growth(verdict, frame.run)
    if verdict.kind == "spike" and verdict.signal.startswith("gradient/"):
        return _gradient_spike(verdict, frame.run)
    if verdict.kind == "wiring" or verdict.signal.startswith("wiring/"):
        return _wiring(verdict)
    return _generic(verdict)


def _at(verdict: Verdict) -> str:
    return f" at {verdict.cell}" if verdict.cell.coordinates else ""


def _logit_growth(verdict: Verdict, run: RunInfo) -> Explanation:
    normalised = run.normalisation.get("query_key", 0)
    title = f"Attention logits are too large{_at(verdict)}"
    if verdict.steps_to_limit is not None and verdict.steps_to_limit[1] > 0:
        title = f"Attention logits will pass {number(verdict.limit or 0.0)} in about "
        title += f"{in_steps(verdict.steps_to_limit[1])}{_at(verdict)}"
    cause = (
        "Queries and keys grow, and their product with the square of it: attention turns one-hot, its gradient "
        "vanishes, and the loss follows. The usual reason is a learning rate that is too high for this size of model."
    )
    ruled_out = []
    if verdict.signal == "attention/logit_range":
        ruled_out.append("a shift that softmax does not feel, such as a bias on the keys: the range leaves it out")
    if normalised:
        ruled_out.append(f"missing query/key normalisation: this model has {normalised} such layers")
    remedies = [*_lower_lr(run), *_longer_warmup(run)]
    if not normalised:
        remedies.insert(
            0,
            Remedy(
                "Normalise queries and keys (LayerNorm or RMSNorm on each head) before their product.",
                when="next run",
                source=f"{_PROXIES} section 3.1.1: trains 1.2B parameters at a learning rate of 0.3",
            ),
        )
    remedies.append(
        Remedy(
            "Rescale the query and key weights of a head whenever its largest logit passes 100 (QK-clip).",
            when="restart",
            source="Kimi K2, arXiv 2507.20534",
        )
    )
    return Explanation(title, cause, tuple(ruled_out), tuple(remedies))


def _inherited(verdict: Verdict) -> Explanation:
    return Explanation(
        f"This run started with large attention logits{_at(verdict)}",
        "The weights that it began from have them already; trained models with such logits exist and are healthy. "
        "From here on only growth against that level is judged.",
    )


def _precision(verdict: Verdict) -> Explanation:
    return Explanation(
        f"Attention logits are large enough to lose their precision{_at(verdict)}",
        "A raw logit may be large through a bias on the keys, which softmax does not feel; but bfloat16 keeps only "
        "three digits of it, so what is left of the differences is rounding error.",
        remedies=(
            Remedy(
                "Compute attention scores and their softmax in float32.",
                when="restart",
                source="one unit in the last place of bfloat16 is 64 at 1e4",
            ),
            Remedy("Leave out the bias of the key projection: softmax cancels it.", when="next run"),
        ),
    )


def _gradient_spike(verdict: Verdict, run: RunInfo) -> Explanation:
    remedies = []
    if run.clip is None:
        remedies.append(
            Remedy(
                f"Clip gradients at a global norm of {number(CLIP)}.",
                {"clip": CLIP},
                "restart",
                f"{_PROXIES}: the setting of its runs",
            )
        )
    for optimizer in run.optimizers:
        betas = optimizer.settings.get("betas")
        if isinstance(betas, (list, tuple)) and len(betas) == 2 and float(betas[1]) > BETA2:
            text = f"Lower beta2 of {optimizer.kind} from {betas[1]:g} to {BETA2:g}: its second moment lags behind."
            change = {_key(run, optimizer, "betas"): [betas[0], BETA2]}
            remedies.append(Remedy(text, change, "restart", f"{_SPIKES}: fewer spikes at a lower beta2"))
    remedies.append(
        Remedy(
            "Save a checkpoint; if the loss follows within some steps, go back and skip these batches.", when="now"
        )
    )
    ruled_out = ("an unclipped step: gradients are clipped at " + number(run.clip[1]),) if run.clip else ()
    return Explanation(
        f"Gradient norm jumped{_at(verdict)}",
        "An unusual batch, or a second moment that underestimates the gradients it now meets. Most jumps pass "
        "without harm; loss spikes are often preceded by one.",
        ruled_out,
        tuple(remedies),
    )


def _nonfinite(verdict: Verdict, frame: Frame) -> Explanation:
    run = frame.run
    value = "NaN" if math.isnan(verdict.value) else "infinite"
    if verdict.severity == "info":
        return Explanation(
            f"Gradients overflowed{_at(verdict)}",
            "The loss scaler of 16-mixed precision tries large scales and skips the steps that overflow: normal "
            "while it looks for one.",
        )
    if verdict.severity == "warning":
        return Explanation(f"{verdict.signal} is {value}{_at(verdict)}", "A number that the training code logs.")
    what = {"gradient": "The gradient", "loss": "The loss"}.get(verdict.signal.split("/")[0], verdict.signal)
    remedies = [
        Remedy(
            f"Stop and go back to a checkpoint from before step {verdict.step}: weights updated with such a gradient "
            "do not recover.",
            when="now",
        ),
        Remedy(
            "Repeat the step under torch.autograd.set_detect_anomaly(True), which names the operation.",
            when="restart",
        ),
    ]
    if run.precision is not None and run.precision.startswith("16"):
        remedies.append(
            Remedy("Use bf16-mixed: float16 overflows above 65504.", {"precision": "bf16-mixed"}, "restart")
        )
    if run.clip is None:
        remedies.append(Remedy(f"Clip gradients at a global norm of {number(CLIP)}.", {"clip": CLIP}, "restart"))
    return Explanation(
        f"{what} is {value}{_at(verdict)}",
        "An overflow, a division by zero, a logarithm or root of a number not above zero, or a bad value in a batch.",
        (),
        (*remedies, *_lower_lr(run)),
    )


def _wiring(verdict: Verdict) -> Explanation:
    count = verdict.others + 1
    tensors = str(verdict.cell.coordinates[-1]) if count == 1 and verdict.cell.coordinates else f"{count} tensors"
    s = "s" if count == 1 else ""
    do, have = ("does", "has") if count == 1 else ("do", "have")
    if verdict.signal == "gradient/rms":
        return Explanation(
            f"{tensors} get{s} no gradient so far",
            "Usually so by construction: a key bias, which softmax cancels; LoRA's A at its first step; what stands "
            "behind a branch that starts at zero; experts that no token has reached.",
            remedies=(Remedy("Nothing, unless one of them should learn from the first step on.", when="now"),),
        )
    if verdict.signal == "wiring/ungraded":
        return Explanation(
            f"No gradient reaches {tensors}",
            "The loss does not depend on it: a detach, a .data, an .item(), a block under no_grad, or a module that "
            "the forward pass never calls.",
            remedies=(
                Remedy("Look for what cuts the graph between this tensor and the loss.", when="restart"),
                Remedy("If it is not to be trained, set requires_grad=False and leave it out.", when="restart"),
            ),
        )
    if verdict.signal == "wiring/unchanged":
        return Explanation(
            f"{tensors} {have} a gradient and {do} not learn",
            "The learning rate of its parameter group is 0, or the update is lost in the rounding of the weights, as "
            "with bfloat16 weights and a small learning rate.",
            remedies=(
                Remedy("Check the learning rate of each parameter group and its schedule.", when="now"),
                Remedy("Keep the weights in float32 and compute in bfloat16 by autocast.", when="restart"),
            ),
        )
    if verdict.signal == "wiring/frozen_changed":
        if verdict.severity == "info":
            return Explanation(
                f"{tensors} that nothing trains change{s}",
                "They are a copy of trained ones and change together, as those of a teacher or a target network do "
                "that follows its student.",
            )
        return Explanation(
            f"{tensors} {'is' if count == 1 else 'are'} frozen and changed",
            "Something writes to it: an optimizer that still holds it and moves it by momentum or weight decay, an "
            "averaged copy, or code that loads weights.",
            remedies=(
                Remedy("Build the optimizer from parameters with requires_grad=True only.", when="restart"),
                Remedy("Look for in-place writes to it in hooks, callbacks and the forward pass.", when="now"),
            ),
        )
    if verdict.signal == "wiring/owners":
        number_of = "no optimizer" if verdict.value < 1 else f"{verdict.value:.0f} optimizers"
        return Explanation(
            f"{tensors} {have} {number_of}" + (" (the first of them)" if count > 1 else ""),
            "It asks for a gradient. In no optimizer it is never updated; in two it is updated twice a step.",
            remedies=(
                Remedy("Add it to exactly one optimizer.", when="restart"),
                Remedy(
                    "If it is not to be trained, set requires_grad=False: that saves its gradient.", when="restart"
                ),
            ),
        )
    if verdict.signal == "wiring/replicas_differ":
        if verdict.severity == "info":
            return Explanation(
                f"{tensors} differ{s} between ranks from the start",
                "Right where ranks hold parts of one tensor (tensor or expert parallelism), a fault where they "
                "should hold copies: then they were initialised with different seeds.",
            )
        return Explanation(
            f"Ranks hold different values of {tensors}",
            "Replicas have drifted apart: an update, a write or a skipped step on some ranks only, or gradients that "
            "were not averaged.",
            remedies=(
                Remedy(
                    "Stop and go back to a checkpoint: what ranks learn from here on is not one model.", when="now"
                ),
                Remedy(
                    "Look for writes to parameters that depend on the rank, and for parameters that "
                    "DistributedDataParallel was not given.",
                    when="restart",
                ),
            ),
        )
    return _generic(verdict)


def _generic(verdict: Verdict) -> Explanation:
    signal = BY_NAME.get(verdict.signal)
    found = {
        "spike": "jumped",
        "forecast": "is on its way to its limit",
        "trend": "is drifting",
        "shift": "has left its level",
    }.get(verdict.kind, "is beyond its limit")
    return Explanation(
        f"{verdict.signal} {found}{_at(verdict)}",
        f"{signal.summary}; {signal.source}" if signal is not None and signal.source else "",
        remedies=(
            Remedy(
                f"Look at {verdict.signal} around step {verdict.step}, beside the loss and the learning rate; keep a "
                "checkpoint from before.",
                when="now",
            ),
        ),
    )


def _lower_lr(run: RunInfo) -> list[Remedy]:
    changes: dict[str, Any] = {}
    words = []
    for optimizer in run.optimizers:
        peak = optimizer.peak_lr if optimizer.peak_lr is not None else optimizer.settings.get("lr")
        if not isinstance(peak, (int, float)) or not peak > 0:
            continue
        lower = float(f"{LOWER_LR * peak:.0e}")
        changes[_key(run, optimizer, "lr")] = lower
        words.append(f"from {peak:g} to {lower:g}" + (f" ({optimizer.name})" if len(run.optimizers) > 1 else ""))
    how = " " + ", ".join(words) if words else " to a third"
    return [Remedy(f"Lower the peak learning rate{how}.", changes, "restart", f"{_PROXIES} section 3.1.1")]


def _longer_warmup(run: RunInfo) -> list[Remedy]:
    source = f"{_PROXIES} section 3.2: longer warm-up lowers the sensitivity to the learning rate"
    if run.length is None:
        longer = None if not run.warmup else 2 * run.warmup
    else:
        longer = max(math.ceil(WARMUP_SHARE * run.length), 2 * (run.warmup or 0))
        if longer > run.length // 2:  # most of the run would be warm-up: no advice
            return []
    if longer is None:
        return [Remedy(f"Warm up over the first {WARMUP_SHARE:.0%} of the run.", {}, "next run", source)]
    instead = f" instead of {run.warmup}" if run.warmup else ""
    return [Remedy(f"Warm up over {longer} steps{instead}.", {"warmup": longer}, "next run", source)]


def _key(run: RunInfo, optimizer: OptimizerInfo, setting: str) -> str:
    """``optimizer.lr``, or ``optimizer.<name>.lr`` where there are several."""
    return f"optimizer.{optimizer.name}.{setting}" if len(run.optimizers) > 1 else f"optimizer.{setting}"
