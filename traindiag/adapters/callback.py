"""What the callbacks of all frameworks share: their arguments, and what there is to see."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from traindiag.alerts.alert import Alert
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.settings import Action, Settings
from traindiag.monitors.monitor import Monitor
from traindiag.record.coverage import Coverage
from traindiag.record.series import History
from traindiag.rules.rule import Rule, Severity

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from typing_extensions import Self


class DiagnosticsCallback:
    """Settings before a run, its :class:`Diagnostics` in it; a framework's hooks are left to subclasses."""

    def __init__(
        self,
        monitors: Sequence[Monitor] = (),
        rules: Sequence[Rule] = (),
        every_n_steps: int = 10,
        max_overhead: float | None = 0.02,
        actions: Sequence[Action] = (),
        watch: str | Sequence[str] = "*",
        *,
        default_monitors: bool = True,
        default_rules: bool = True,
        exclude: Sequence[str] = (),
        severity: Mapping[str, Severity] | None = None,
        silence: Mapping[str, str] | None = None,
        fast: bool = True,
        exact: bool = False,
        layout: bool = True,
        report: bool = False,
        terminal: bool = True,
        batch_id: Callable[[Any], Any] | None = None,
        strict: bool = False,
    ) -> None:
        """Checks everything that is asked for, now and not at step 10,000.

        Args:
            monitors: Monitors beside the default ones, or in the place of the default one of the same name.
            rules: Rules beside the default pack, for example ``Threshold("attention/max_logit", above=500)``.
            every_n_steps: Cadence of everything that is not measured every step.
            max_overhead: Share of the step time above which sampling backs off, on all ranks alike; None: never.
            actions: What an alert does beside being shown: ``StopTraining()``, ``SaveCheckpoint()``, ``Raise()``,
                ``Webhook(env=...)``, ``Call(function)``, or a plain function, which is called with every alert.
            watch: Glob, or globs, over module names; ``"*"`` is every module that an optimizer trains.
            default_monitors: Whether the families that every model has are watched.
            default_rules: Whether the default pack judges.
            exclude: Families of default monitors, or names of default rules (globs), to leave out.
            severity: Severities that default rules speak with, by name: ``{"gradient/norm-spike": "info"}``.
            silence: Names of default rules that are not to judge, with the reason for each; told at the end.
            fast: Whether loss and gradients are measured every step, or only with the samples.
            exact: Whether attention maxima are always exact, at a higher cost.
            layout: Whether a custom-scalars layout is written for TensorBoard.
            report: Whether a report is written at the end, beside ``alerts.jsonl``: one HTML file, which needs
                plotly. Where a run of W&B is under way it becomes an artifact of it too.
            terminal: Whether alerts, coverage and the summary are printed.
            batch_id: Function from a batch to the ids of its samples, such as ``lambda batch: batch["id"]``; alerts
                about fast failures then name them. It is called in every step, so it should not wait for the device.
            strict: Whether a fault in a monitor or a rule stops the run.

        Raises:
            ValueError: For a wrong setting, with its value and what was expected.
        """
        self._settings = Settings(
            monitors=monitors,
            default_monitors=default_monitors,
            rules=rules,
            default_rules=default_rules,
            exclude=exclude,
            severity=severity or {},
            silence=silence or {},
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            actions=actions,
            watch=watch,
            fast=fast,
            exact=exact,
            layout=layout,
            report=report,
            terminal=terminal,
            batch_id=batch_id,
            strict=strict,
        )
        self._diagnostics: Diagnostics | None = None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """The callback with settings from a file whose keys are the arguments above.

        Values are plain data (``1e4`` is a number). A rule or monitor is ``- Threshold: {signal: loss/value, above:
        5}``: names are those of traindiag, and of installed packages that offer them as entry points of the group
        ``traindiag.plugins``, which is also where ``- Call: {function: ...}`` finds functions. Nothing else is
        imported.

        Raises:
            ValueError: With file, line, key, what was found and what was expected.
            OSError: If the file cannot be read.
        """
        settings = Settings.from_yaml(path)
        return cls(**{f.name: getattr(settings, f.name) for f in fields(settings)})

    @property
    def alerts(self) -> list[Alert]:
        """Everything told so far, oldest first."""
        return self._diagnostics.alerts if self._diagnostics else []

    @property
    def history(self) -> History:
        """Every number measured so far, by signal."""
        return self._diagnostics.history if self._diagnostics else History()

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """What is seen and what is not, with reasons."""
        return self._diagnostics.coverage if self._diagnostics else ()

    def plot(self, what: str = "timeline", *, theme: str = "light", **options: str) -> Figure:
        """A figure of what was measured so far; see :meth:`traindiag.Diagnostics.plot`."""
        if self._diagnostics is None:
            raise RuntimeError(f"diagnostics.plot({what!r}) needs a run: call it while the trainer fits, or after")
        return self._diagnostics.plot(what, theme=theme, **options)

    def log(self, name: str, value: Tensor | float) -> None:
        """Takes a number of your own for this step; every rule can judge it.

        Raises:
            RuntimeError: Outside of training.
        """
        if self._diagnostics is None:
            raise RuntimeError(f"diagnostics.log({name!r}, ...) needs a run: call it while the trainer fits")
        self._diagnostics.log(name, value)

    def _finish(self, *, failed: bool = False) -> None:
        if self._diagnostics is not None:
            self._diagnostics.finish(failed=failed)
