"""Two independent witnesses make a warning of what each alone is only a note."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from traindiag.alerts.diagnosis.failure import TOGETHER, Witness
from traindiag.alerts.diagnosis.memory import Memory
from traindiag.rules.rule import Severity

_SOURCES = {
    "loss/value": "loss",
    "gradient/norm": "gradient",
    "gradient/norm_applied": "gradient",
    "optimizer/rms_t": "second moment",
    "optimizer/sentinel_rms_t": "second moment",
}


def promoted(severity: Severity, witnesses: Iterable[Witness], memory: Memory) -> Severity:
    """The severity of an event, given all that speak for it.

    A gradient norm that jumps is a note: most such jumps pass without harm. Together with a loss that jumps within 8
    steps, and by a tenth of the first loss at least, it is a warning, and so is either with a second moment that has
    been left behind.

    A gradient norm and RMS_t that rise *in the same step* are one witness and not two. A gradient k times the usual
    one gives by itself an RMS_t of k / sqrt(beta2 + (1 - beta2) k^2), which for k = 4 is 3.0 at beta2 0.95 and 4.0 at
    0.999: beyond any limit in use. RMS_t says something of its own where it rose first.

    Example:
        >>> from traindiag.rules.rule import Verdict
        >>> jump, loss, moment = (
        ...     Witness(Verdict(signal, "spike", signal, step, severity="info"), step)
        ...     for signal, step in (("gradient/norm", 9), ("loss/value", 10), ("optimizer/rms_t", 9)))
        >>> [promoted("info", told, Memory()) for told in ([jump], [jump, loss], [jump, moment])]
        ['info', 'warning', 'info']
    """
    if severity != "info":
        return severity
    known = [
        (source, w)
        for w in witnesses
        if (source := _SOURCES.get(w.last.signal))
        and w.last.kind != "trend"
        and (source != "loss" or memory.rose(w.last.value))
    ]
    return "warning" if any(_independent(*a, *b) for a, b in combinations(known, 2)) else severity


def _independent(source: str, witness: Witness, other_source: str, other: Witness) -> bool:
    if source == other_source or abs(witness.since - other.since) > TOGETHER:
        return False
    since = {source: witness.since, other_source: other.since}
    return "loss" in since or since["second moment"] < since["gradient"]
