"""The rules that a settings file asks for, read without torch."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from traindiag.record.catalogue import near
from traindiag.rules.alive import StructuralZeros
from traindiag.rules.asked import as_asked, check_asked
from traindiag.rules.default_pack import default_rules as default_pack
from traindiag.rules.forecast import Forecast
from traindiag.rules.growth import Growth
from traindiag.rules.loss_surge import LossSurge
from traindiag.rules.nonfinite import NonFinite
from traindiag.rules.output_drift import OutputDrift
from traindiag.rules.plasticity import EarlyLoss, LostPlasticity, PlasticityPlateau
from traindiag.rules.resumed import OptimizerStateLost
from traindiag.rules.rule import Rule, Severity
from traindiag.rules.rule_set import RuleSet
from traindiag.rules.second_moment import StaleSecondMoment
from traindiag.rules.shift import Shift
from traindiag.rules.spike import Spike
from traindiag.rules.stability import TaskGap
from traindiag.rules.threshold import Threshold
from traindiag.rules.trend import Trend
from traindiag.rules.vanishing import Vanishing
from traindiag.rules.wiring import FrozenChanged, Owners, ReplicasDiffer, Unchanged, Ungraded
from traindiag.rules.yaml_file import read_keywords

RULES: Mapping[str, Callable[..., Any]] = {
    c.__name__: c
    for c in (
        Threshold,
        Forecast,
        Spike,
        Trend,
        Shift,
        Growth,
        StaleSecondMoment,
        OptimizerStateLost,
        EarlyLoss,
        LostPlasticity,
        PlasticityPlateau,
        OutputDrift,
        TaskGap,
        LossSurge,
        Vanishing,
        NonFinite,
        StructuralZeros,
        Ungraded,
        Unchanged,
        FrozenChanged,
        Owners,
        ReplicasDiffer,
    )
}
"""Rules by the names that a file may use."""

OF_A_RUN = (
    "monitors",
    "default_monitors",
    "every_n_steps",
    "max_overhead",
    "actions",
    "watch",
    "fast",
    "exact",
    "layout",
    "report",
    "batch_id",
    "terminal",
    "strict",
)
"""The settings of a run that rules do not depend on, so that the file of a run serves a replay as it is."""


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    r"""New rules as a run with this settings file has them: the default pack less ``exclude``, then ``rules``.

    Args:
        path: The file that ``TrainingDiagnostics.from_yaml`` takes, or one with the keys on rules only.

    Raises:
        ValueError: With file, line, key, what was found and what was expected.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "rules.yaml"
        ...     _ = file.write_text("default_rules: false\nrules: [{Threshold: {signal: reward/kl, above: 10}}]")
        ...     [rule.name for rule in read_rules(file)]
        ['reward/kl above 10']
    """
    keywords = read_keywords(path, _chosen, {"rules": RULES}, passed_over=OF_A_RUN)
    try:
        return _chosen(**keywords)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _chosen(
    rules: Sequence[Rule] = (),
    default_rules: bool = True,
    exclude: Sequence[str] = (),
    severity: Mapping[str, Severity] | None = None,
    silence: Mapping[str, str] | None = None,
) -> list[Rule]:
    severity, silence = severity or {}, silence or {}
    check_asked(severity, silence)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules must hold Rule objects, got {rule!r}")
    pack = default_pack() if default_rules else []
    names = [rule.name for rule in default_pack()]
    for pattern in exclude:  # it may also mean a monitor, which is not known here; what is near a rule is a slip
        close = near(pattern, names, cutoff=0.8)
        if close and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude: no default rule is called {pattern!r}.{close}")
    kept = [r for r in pack if not any(fnmatch.fnmatchcase(r.name, pattern) for pattern in exclude)]
    return RuleSet([*as_asked(kept, severity, silence), *rules]).rules
