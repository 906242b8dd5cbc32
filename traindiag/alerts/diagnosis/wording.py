"""Sentences that several failures share."""

from __future__ import annotations

from traindiag.alerts.diagnosis.failure import Case, Witness
from traindiag.alerts.diagnosis.memory import Level
from traindiag.rules.wording import number


def change_of(case: Case, signal: str, *, low: bool = False) -> tuple[str, ...]:
    """``loss/value was 2 at step 0 and is 3 (step 7)``, or nothing where one of both is unknown.

    Args:
        case: What is judged.
        signal: Name of a signal.
        low: Whether the smallest cell speaks for all, and not the largest.
    """
    now, before = case.now(signal), case.before(signal)
    if now is None or before is None:
        return ()
    then, value, place = (before.low, now.low, now.low_at) if low else (before.high, now.high, now.high_at)
    where = f" at {place}" if place else ""
    return (f"{signal} was {number(then)} at step {before.step} and is {number(value)}{where} (step {now.step})",)


def usual(what: str, level: Level | None, limit: float) -> tuple[str, ...]:
    """``what was at most 1.02 (step 10)`` where a level is below a limit: that number rules it out."""
    if level is None or not level.high < limit:
        return ()
    where = f" at {level.high_at}" if level.high_at else ""
    return (f"{what} was at most {number(level.high)}{where} (step {level.step})",)


def said_by(witness: Witness | None) -> tuple[str, ...]:
    """What another rule has to say, with its step."""
    if witness is None or not witness.last.evidence:
        return ()
    return (f"{witness.last.evidence} (step {witness.last.step})",)
