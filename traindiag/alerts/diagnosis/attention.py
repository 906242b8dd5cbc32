"""Failures of attention."""

from __future__ import annotations

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.failure import Case, Failure, Finding
from traindiag.alerts.diagnosis.remedies import longer_warmup, lower_lr, query_key_norm
from traindiag.alerts.diagnosis.wording import change_of, usual
from traindiag.rules.wording import in_steps, number

_RANGE = "attention/logit_range"
_RAW = ("attention/max_logit", "attention/max_logit_bound")
_NORMS = ("attention/query_norm", "attention/key_norm")
_ENTROPY = "attention/entropy"

INHERITED = 0.5
"""Share of a limit from which a first value is a level that the run brought along; batches differ by about that."""

SHIFTED = 0.1
"""A range below this share of the raw maximum: most of the maximum is a shift that softmax cancels."""

GROWN = 2.0
"""Growth of the range that norms or entropy must come with; norms double as weights find their size."""

USUAL_UPDATE = 0.03
"""Half-way, on a logarithmic scale, from 0.01, a large but usual update-to-weight ratio, to 0.1, where TheDeepChecker
calls it too large."""


class AttentionLogitGrowth(Failure):
    """Queries and keys grow until attention is one-hot.

    The range of the logits speaks for itself. Norms alone, or entropy alone, may be healthy: attention to one token
    can be learned (arXiv 2505.21910 calls it benign), so they count together with a range that has grown.
    """

    name = "attention-logit growth"
    family = "attention"
    signals = (_RANGE, *_RAW, *_NORMS, _ENTROPY)

    def diagnose(self, case: Case) -> Finding | None:
        verdict, run = case.verdict, case.run
        logits = case.by(_RANGE, kinds=("threshold", "forecast", "trend", "shift"))
        if (
            verdict.kind == "threshold"
            and verdict.severity == "info"
            and (logits is None or verdict.signal == _RANGE)
        ):
            return None
        if verdict.signal in _RAW and _is_shift(case):
            return None
        if verdict.signal in (*_NORMS, _ENTROPY) and logits is None and not (case.grown(_RANGE) or 0) >= GROWN:
            return None
        normalised = run.normalisation.get("query_key", 0)
        ruled_out = []
        if verdict.signal == _RANGE or logits is not None:
            ruled_out.append(
                "a shift that softmax does not feel, such as a bias on the keys: the range leaves it out"
            )
        if normalised:
            ruled_out.append(f"missing query/key normalisation: this model has {normalised} such layers")
        update = case.by("optimizer/update_ratio")
        if update is None:
            ratio = case.now("optimizer/update_ratio")
            ruled_out += usual("updates out of proportion: their size against the weights", ratio, USUAL_UPDATE)
        slower = lower_lr(run)
        if update is not None:  # what is moved too fast as a whole is not cured by a layer
            remedies = [*slower, *query_key_norm(run), *longer_warmup(run)]
        else:
            remedies = [*query_key_norm(run), *slower, *longer_warmup(run)]
        remedies.append(
            Remedy(
                "Rescale the query and key weights of a head whenever its largest logit passes 100 (QK-clip).",
                when="restart",
                source="Kimi K2, arXiv 2507.20534",
            )
        )
        return Finding(
            _title(case),
            "Queries and keys grow, and their product with the square of it: attention turns one-hot, its gradient "
            "vanishes, and the loss follows. The usual reason is a learning rate that is too high for this size of "
            "model.",
            tuple(text for name in (_RANGE, *_NORMS) if name != verdict.signal for text in change_of(case, name)),
            tuple(ruled_out),
            tuple(remedies),
        )


class InheritedLogits(Failure):
    """A run that began with large logits; told once."""

    name = "inherited attention logits"
    family = "attention"
    signals = (_RANGE,)
    kinds = ("threshold",)

    def diagnose(self, case: Case) -> Finding | None:
        first, limit = case.memory.first(_RANGE), case.verdict.limit
        if case.verdict.severity != "info" or limit is None or first is None or first.high < INHERITED * limit:
            return None
        return Finding(
            f"This run started with large attention logits{case.at}",
            "The weights that it began from have them already; trained models with such logits exist and are "
            "healthy. From here on only growth against that level is judged.",
        )


class ImpreciseLogits(Failure):
    """Raw logits so large that low precision rounds their differences away."""

    name = "imprecise attention logits"
    family = "attention"
    signals = _RAW

    def diagnose(self, case: Case) -> Finding | None:
        ruled_out: tuple[str, ...] = ()
        if _is_shift(case) and (level := case.now(_RANGE)):
            ruled_out = (
                f"attention-logit growth: what softmax feels of it is at most {number(level.high)} "
                f"({_RANGE}, step {level.step})",
            )
        return Finding(
            f"Attention logits are large enough to lose their precision{case.at}",
            "A raw logit may be large through a bias on the keys, which softmax does not feel; but bfloat16 keeps "
            "only three digits of it, so what is left of the differences is rounding error.",
            ruled_out=ruled_out,
            remedies=(
                Remedy(
                    "Compute attention scores and their softmax in float32.",
                    when="restart",
                    source="one unit in the last place of bfloat16 is 64 at 1e4",
                ),
                Remedy("Leave out the bias of the key projection: softmax cancels it.", when="next run"),
            ),
        )


class SharpenedAttention(Failure):
    """Entropy that falls while logits stay as they are."""

    name = "attention entropy drop"
    family = "attention"
    signals = (_ENTROPY,)

    def diagnose(self, case: Case) -> Finding | None:
        level = case.now(_RANGE)
        return Finding(
            f"Attention has become sharp{case.at}",
            "Heads look at few tokens. That can be learned and healthy; it is a failure where the logits behind it "
            "keep growing.",
            change_of(case, _ENTROPY, low=True),
            usual("attention-logit growth: the range of the logits", level, 1e3),
            (
                Remedy(
                    "Watch attention/logit_range: act when it passes 100 and still grows.",
                    when="now",
                    source="Zhai et al. 2023, arXiv 2303.06296; benign collapse: arXiv 2505.21910",
                ),
                *lower_lr(case.run, source="Zhai et al. 2023, arXiv 2303.06296"),
            ),
        )


def _is_shift(case: Case) -> bool:
    level, value = case.now(_RANGE), case.verdict.value
    return level is not None and level.high < SHIFTED * value


def _title(case: Case) -> str:
    verdict = case.verdict
    if verdict.steps_to_limit is not None and verdict.steps_to_limit[1] > 0:
        when = in_steps(verdict.steps_to_limit[1])
        return f"Attention logits will pass {number(verdict.limit or 0.0)} in about {when}{case.at}"
    if verdict.kind == "threshold" and verdict.signal == _RANGE:
        return f"Attention logits are too large{case.at}"
    return f"Attention logits are growing{case.at}"
