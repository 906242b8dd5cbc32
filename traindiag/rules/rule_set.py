"""All rules of a run, over its frames in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from traindiag.record.catalogue import BY_NAME, ON_DEMAND
from traindiag.record.frame import Frame
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.rule import Rule, Verdict


class RuleSet:
    """Runs rules over frames, :class:`~traindiag.rules.nonfinite.NonFinite` first.

    A rule that raises is reported once and switched off: a fault in a rule must not end a training run.

    Args:
        rules: Rules with unique names.
        on_fault: Called with the rule's name and the exception when a rule is switched off.
        strict: Let the exception through instead.

    Raises:
        ValueError: If two rules share a name.

    Example:
        >>> from traindiag.rules.threshold import Threshold
        >>> rules = RuleSet([Threshold("reward/kl", above=10.0)])
        >>> rules.unjudged()
        {'reward/kl above 10': ('reward/kl',)}
    """

    def __init__(
        self, rules: Iterable[Rule], *, on_fault: Callable[[str, Exception], None] | None = None, strict: bool = False
    ) -> None:
        self.rules = sorted(rules, key=lambda rule: not isinstance(rule, NonFinite))
        self.faults: dict[str, str] = {}
        """Rules that were switched off, with the reason."""
        self.patient = all(rule.patient for rule in self.rules if not _reads_samples_only(rule))
        """Whether no rule on what is measured every step has to see each step at once."""
        self._on_fault, self._strict = on_fault, strict
        self._met: set[str] = set()
        self._interested: dict[tuple[str, ...], list[Rule]] = {}
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rules need unique names, got more than one {', '.join(map(repr, twice))}: pass name=")

    def update(self, frame: Frame) -> list[Verdict]:
        """Judges one frame."""
        signals = tuple(frame.readings)
        interested = self._interested.get(signals)
        if interested is None:  # a run has few different sets of signals
            interested = [r for r in self.rules if not r.signals or not set(r.signals).isdisjoint(signals)]
            self._interested[signals] = interested
            self._met |= set(signals)
        verdicts: list[Verdict] = []
        for rule in interested:
            if rule.name in self.faults:
                continue
            try:
                found = rule.update(frame)
            except Exception as error:
                self._switch_off(rule, error)
                continue
            verdicts += found if rule.told_as is None else [replace(v, severity=rule.told_as) for v in found]
        return verdicts

    def unjudged(self) -> dict[str, tuple[str, ...]]:
        """Rules that have judged nothing, with the signals that they wait for."""
        return {r.name: r.signals for r in self.rules if r.signals and not self._met.intersection(r.signals)}

    def not_asked_for(self) -> set[str]:
        """Those of them on families that only monitors measure which a run must ask for: nobody waits for them."""
        return {n for n, signals in self.unjudged().items() if {s.split("/")[0] for s in signals} <= ON_DEMAND}

    def digest(self) -> str:
        """A short hash of every rule and setting, independent of order: what a benchmark's numbers were made with."""
        told = sorted(
            (rule.name, type(rule).__qualname__, rule.settings(), *([rule.told_as] if rule.told_as else []))
            for rule in self.rules
        )
        text = json.dumps(told, sort_keys=True, default=lambda value: type(value).__qualname__)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """The state of each rule that is still on, by name."""
        return {rule.name: rule.state_dict() for rule in self.rules if rule.name not in self.faults}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues every rule that has a state; a new rule starts afresh and one that is gone is left out."""
        for rule in self.rules:
            if rule.name not in state:
                continue
            try:
                rule.load_state_dict(state[rule.name])
            except Exception as error:
                self._switch_off(rule, error)

    def _switch_off(self, rule: Rule, error: Exception) -> None:
        if self._strict:
            raise error
        self.faults[rule.name] = f"{type(error).__name__}: {error}"
        if self._on_fault is not None:
            self._on_fault(rule.name, error)


def _reads_samples_only(rule: Rule) -> bool:
    return bool(rule.signals) and all(name in BY_NAME and BY_NAME[name].lane != "fast" for name in rule.signals)
