"""Settings from a YAML file: plain data and registered names, nothing that could run code."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from traindiag.engine.yaml_actions import ACTIONS
from traindiag.monitors.activation import ActivationMonitor
from traindiag.monitors.attention import AttentionMonitor
from traindiag.monitors.critic_plasticity import CriticPlasticity
from traindiag.monitors.gradient import GradientMonitor
from traindiag.monitors.gradient_detail import GradientDetailMonitor
from traindiag.monitors.loss import LossMonitor
from traindiag.monitors.optimizer import OptimizerMonitor
from traindiag.monitors.output import OutputMonitor
from traindiag.monitors.sentinel import SentinelMonitor
from traindiag.monitors.wiring import WiringMonitor
from traindiag.rules.rules_file import RULES
from traindiag.rules.yaml_file import Registered, read_keywords

BUILT_IN: Registered = {
    "rules": RULES,
    "monitors": {
        c.__name__: c
        for c in (
            ActivationMonitor,
            AttentionMonitor,
            CriticPlasticity,
            GradientMonitor,
            GradientDetailMonitor,
            LossMonitor,
            OptimizerMonitor,
            OutputMonitor,
            SentinelMonitor,
            WiringMonitor,
        )
    },
    "actions": ACTIONS,
}


def read_settings(
    path: str | os.PathLike[str], target: Callable[..., Any], lines: dict[str, int] | None = None
) -> dict[str, Any]:
    r"""Keyword arguments for ``target`` from a file; an empty file has none.

    A rule, monitor or action is a name, or a name with its arguments::

        every_n_steps: 20
        rules:
          - Threshold: {signal: attention/max_logit, above: 1e4}
          - NonFinite

    Args:
        path: The file.
        target: What the keys are arguments of.
        lines: Takes the line of each key, and of each entry ``key.entry`` of one that holds a mapping.

    Raises:
        ValueError: With file, line, key, what was found and what was expected.
        OSError: If the file cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from traindiag.engine.settings import Settings
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "diagnostics.yaml"
        ...     _ = file.write_text("max_overhead: 1e-2\nrules: [{Spike: {signal: reward/kl}}]")
        ...     read_settings(file, Settings)["max_overhead"]
        0.01
    """
    return read_keywords(path, target, BUILT_IN, lines=lines)
