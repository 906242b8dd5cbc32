"""Default rules as a user asks for them: with other severities, or silent for a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from traindiag.record.catalogue import near
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import SEVERITIES, Rule, Severity


def as_asked(rules: Iterable[Rule], severity: Mapping[str, Severity], silence: Mapping[str, str]) -> list[Rule]:
    """Those of ``rules`` that are not silenced, each with the severity that is asked for.

    Example:
        >>> kept = {r.name: r for r in as_asked(default_rules(), {"loss/spike": "warning"}, {"output/drift": "a GAN"})}
        >>> kept["loss/spike"].told_as, "output/drift" in kept
        ('warning', False)
    """
    kept = [rule for rule in rules if rule.name not in silence]
    for rule in kept:
        rule.told_as = severity.get(rule.name)
    return kept


def check_asked(severity: Mapping[str, Severity], silence: Mapping[str, str]) -> None:
    """Refuses names that no default rule has, unknown severities, and silence without a reason.

    Raises:
        ValueError: With the name, and what is near it.
        TypeError: Where one of them is no mapping.
    """
    names = [rule.name for rule in default_rules()]
    for what, given in (("severity", severity), ("silence", silence)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} gives names of default rules with what is to be theirs, got {given!r}")
        for name in given:
            if name not in names:
                close = near(name, names)
                raise ValueError(
                    f"{what}.{name}: no default rule is called {name!r}.{close} There are {', '.join(names)}."
                )
    for name, level in severity.items():
        if level not in SEVERITIES:
            close = near(str(level), SEVERITIES)
            raise ValueError(f"severity.{name}: expected one of {', '.join(SEVERITIES)}, got {level!r}.{close}")
    for name, reason in silence.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"silence.{name}: expected the reason, in words, got {reason!r}")
