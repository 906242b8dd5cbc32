"""What the user asks for, checked when it is asked and not at step 10,000."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from traindiag.alerts.actions import Decision
from traindiag.alerts.alert import Alert
from traindiag.engine.batches import BatchId
from traindiag.engine.schedule import Schedule
from traindiag.engine.yaml_settings import read_settings
from traindiag.monitors.activation import ActivationMonitor
from traindiag.monitors.attention import AttentionMonitor
from traindiag.monitors.gradient import GradientMonitor
from traindiag.monitors.gradient_detail import GradientDetailMonitor
from traindiag.monitors.loss import LossMonitor
from traindiag.monitors.monitor import Monitor
from traindiag.monitors.optimizer import OptimizerMonitor
from traindiag.monitors.output import OutputMonitor
from traindiag.monitors.sentinel import SentinelMonitor
from traindiag.monitors.wiring import WiringMonitor
from traindiag.record.catalogue import check_signal, near
from traindiag.rules import default_pack
from traindiag.rules.asked import as_asked, check_asked
from traindiag.rules.rule import Rule, Severity

Action: TypeAlias = Callable[[Alert], None] | Decision


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that every adapter shares.

    Args:
        monitors: Monitors beside the default ones, or in the place of the default one of the same name.
        default_monitors: Whether the families that every model has are watched.
        rules: Rules beside the default pack.
        default_rules: Whether the default pack judges.
        exclude: Families or names of default monitors, or names of default rules (globs), to leave out.
        every_n_steps: Cadence of the slow lane.
        max_overhead: Share of the step time above which the slow lane backs off; None: never.
        severity: Severities that default rules speak with, by name of the rule, in place of their own.
        silence: Names of default rules that are not to judge, with the reason for each. It is kept with the record
            and told at the end; ``exclude`` leaves out without a word.
        actions: Functions that are called with every alert, and actions such as ``StopTraining()``; in order, on
            every rank.
        watch: Glob, or globs, over module names; ``"*"`` is every module that an optimizer trains.
        fast: Whether the fast lane runs every step; without it, it runs with the samples of the slow lane.
        exact: Whether attention maxima are always exact.
        layout: Whether a custom-scalars layout is written for TensorBoard.
        report: Whether a report is written at the end, beside ``alerts.jsonl``; with plotly installed, and as an
            artifact too where a run of W&B is under way.
        terminal: Whether alerts, coverage and the summary are printed.
        batch_id: Gives the ids of a batch's samples; alerts about fast failures then name them.
        strict: Whether a fault in a monitor or a rule raises instead of switching that part off.

    Raises:
        ValueError: With the value and what was expected.
        TypeError: Where something that is no monitor, rule or function stands in their place.
    """

    monitors: Sequence[Monitor] = ()
    default_monitors: bool = True
    rules: Sequence[Rule] = ()
    default_rules: bool = True
    exclude: Sequence[str] = ()
    every_n_steps: int = 10
    max_overhead: float | None = 0.02
    severity: Mapping[str, Severity] = field(default_factory=dict)
    silence: Mapping[str, str] = field(default_factory=dict)
    actions: Sequence[Action] = ()
    watch: str | Sequence[str] = "*"
    fast: bool = True
    exact: bool = False
    layout: bool = True
    report: bool = False
    terminal: bool = True
    batch_id: BatchId | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        Schedule(self.every_n_steps, self.max_overhead)
        for what, kind, items in (("monitors", Monitor, self.monitors), ("rules", Rule, self.rules)):
            for item in items:
                if not isinstance(item, kind):
                    raise TypeError(f"{what} must hold {kind.__name__} objects, got {item!r}")
        for action in self.actions:
            if isinstance(action, type) or not (callable(action) or isinstance(action, Decision)):
                raise TypeError(f"actions must be functions of an Alert, or actions such as Raise(), got {action!r}")
        if not (self.batch_id is None or callable(self.batch_id)):
            raise TypeError(f"batch_id must be a function from a batch to ids of its samples, got {self.batch_id!r}")
        if not self.watch:
            raise ValueError(f"watch must name at least one module, got {self.watch!r}")
        self._check_exclude()
        check_asked(self.severity, self.silence)
        measured = {s.name for m in self.monitors for s in m.signals}
        for rule in self.rules:
            for signal in rule.signals:
                if "*" not in signal:
                    check_signal(signal, measured)
        _unique("monitor", [m.name for m in self.build_monitors()])
        _unique("rule", [r.name for r in self.build_rules()])

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Settings:
        """Reads settings from a file of plain data and registered names; see :mod:`traindiag.engine.yaml_settings`.

        Raises:
            ValueError: With file, line, key, what was found and what was expected.
            OSError: If the file cannot be read.
        """
        lines: dict[str, int] = {}
        keywords = read_settings(path, cls, lines)
        try:
            return cls(**keywords)
        except (ValueError, TypeError) as error:
            key = str(error).partition(": ")[0] if ": " in str(error) else ""
            line = lines.get(key) or lines.get(str(error).partition(" ")[0].rstrip(":"))
            place = os.fspath(path) if line is None else f"{os.fspath(path)}:{line}"
            raise ValueError(f"{place}: {error}") from error

    def build_monitors(self) -> list[Monitor]:
        """Default monitors that are not excluded, then the user's, which take the place of defaults of their name."""
        defaults = _default_monitors(exact=self.exact) if self.default_monitors else []
        own = {m.name for m in self.monitors}
        kept = [m for m in defaults if not (m.name in own or self._excluded(m.family) or self._excluded(m.name))]
        return [*kept, *self.monitors, *(c for m in self.monitors for c in m.companions())]

    def build_rules(self) -> list[Rule]:
        """Default rules that are neither excluded nor silenced, then the user's."""
        defaults = default_pack.default_rules() if self.default_rules else []
        kept = [r for r in defaults if not self._excluded(r.name)]
        return as_asked(kept, self.severity, self.silence) + list(self.rules)

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def _check_exclude(self) -> None:
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude is a list of names, got the string {self.exclude!r}")
        monitors = _default_monitors(exact=False)
        names = [*dict.fromkeys([m.family for m in monitors] + [m.name for m in monitors])]
        names += [r.name for r in default_pack.default_rules()]
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"exclude: no default monitor or rule is called {pattern!r}.{near(pattern, names)} "
                    f"There are {', '.join(names)}."
                )


def _default_monitors(*, exact: bool) -> list[Monitor]:
    return [
        LossMonitor(),
        GradientMonitor(),
        SentinelMonitor(),
        AttentionMonitor(exact=exact),
        OutputMonitor(),
        ActivationMonitor(),
        GradientDetailMonitor(),
        OptimizerMonitor(),
        WiringMonitor(),
    ]


def _unique(what: str, names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"two {what}s are called {twice[0]!r}; give one of them another name")
