"""Tells you, before the loss does, that a training run is becoming unstable.

Importing this package costs nothing: every public name is loaded when it is first used, so that command-line tools
and panels never wait for torch.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traindiag.adapters.transformers import HFTrainingDiagnostics
    from traindiag.alerts.actions import Call, Raise, SaveCheckpoint, StopTraining, TrainingAlert
    from traindiag.alerts.alert import Alert, Remedy
    from traindiag.alerts.webhook import Webhook
    from traindiag.engine.diagnostics import Diagnostics
    from traindiag.engine.preflight import preflight
    from traindiag.engine.settings import Settings
    from traindiag.lightning import TrainingDiagnostics
    from traindiag.monitors.critic_plasticity import CriticPlasticity
    from traindiag.monitors.monitor import Monitor
    from traindiag.monitors.stability_gap import StabilityGap
    from traindiag.playback.reading import read
    from traindiag.playback.replay import Replay, replay
    from traindiag.playback.series import replay_series
    from traindiag.record.cells import Cell, Cells
    from traindiag.record.frame import Frame, Reading
    from traindiag.record.preflight import Preflight
    from traindiag.record.run_info import RunInfo
    from traindiag.record.series import History, Series
    from traindiag.record.signal import Signal
    from traindiag.rules.adaptive_replay import AdaptiveReplayRatio
    from traindiag.rules.forecast import Forecast
    from traindiag.rules.growth import Growth
    from traindiag.rules.loss_surge import LossSurge
    from traindiag.rules.nonfinite import NonFinite
    from traindiag.rules.output_drift import OutputDrift
    from traindiag.rules.plasticity import EarlyLoss, LostPlasticity, PlasticityPlateau
    from traindiag.rules.resumed import OptimizerStateLost
    from traindiag.rules.rule import Rule, Verdict
    from traindiag.rules.second_moment import StaleSecondMoment
    from traindiag.rules.shift import Shift
    from traindiag.rules.spike import Spike
    from traindiag.rules.stability import TaskGap
    from traindiag.rules.threshold import Threshold
    from traindiag.rules.trend import Trend
    from traindiag.rules.vanishing import Vanishing

__version__ = "0.1.0"

__all__ = [
    "AdaptiveReplayRatio",
    "Alert",
    "Call",
    "Cell",
    "Cells",
    "CriticPlasticity",
    "Diagnostics",
    "EarlyLoss",
    "Forecast",
    "Frame",
    "Growth",
    "HFTrainingDiagnostics",
    "History",
    "LossSurge",
    "LostPlasticity",
    "Monitor",
    "NonFinite",
    "OptimizerStateLost",
    "OutputDrift",
    "PlasticityPlateau",
    "Preflight",
    "Raise",
    "Reading",
    "Remedy",
    "Replay",
    "Rule",
    "RunInfo",
    "SaveCheckpoint",
    "Series",
    "Settings",
    "Shift",
    "Signal",
    "Spike",
    "StabilityGap",
    "StaleSecondMoment",
    "StopTraining",
    "TaskGap",
    "Threshold",
    "TrainingAlert",
    "TrainingDiagnostics",
    "Trend",
    "Vanishing",
    "Verdict",
    "Webhook",
    "preflight",
    "read",
    "replay",
    "replay_series",
]

_HOMES = {
    "traindiag.adapters.transformers": ("HFTrainingDiagnostics",),
    "traindiag.alerts.actions": ("Call", "Raise", "SaveCheckpoint", "StopTraining", "TrainingAlert"),
    "traindiag.alerts.alert": ("Alert", "Remedy"),
    "traindiag.alerts.webhook": ("Webhook",),
    "traindiag.engine.diagnostics": ("Diagnostics",),
    "traindiag.engine.settings": ("Settings",),
    "traindiag.engine.preflight": ("preflight",),
    "traindiag.lightning": ("TrainingDiagnostics",),
    "traindiag.monitors.critic_plasticity": ("CriticPlasticity",),
    "traindiag.monitors.monitor": ("Monitor",),
    "traindiag.monitors.stability_gap": ("StabilityGap",),
    "traindiag.playback.reading": ("read",),
    "traindiag.playback.replay": ("Replay", "replay"),
    "traindiag.playback.series": ("replay_series",),
    "traindiag.record.cells": ("Cell", "Cells"),
    "traindiag.record.frame": ("Frame", "Reading"),
    "traindiag.record.preflight": ("Preflight",),
    "traindiag.record.run_info": ("RunInfo",),
    "traindiag.record.series": ("History", "Series"),
    "traindiag.record.signal": ("Signal",),
    "traindiag.rules.adaptive_replay": ("AdaptiveReplayRatio",),
    "traindiag.rules.forecast": ("Forecast",),
    "traindiag.rules.nonfinite": ("NonFinite",),
    "traindiag.rules.rule": ("Rule", "Verdict"),
    "traindiag.rules.shift": ("Shift",),
    "traindiag.rules.spike": ("Spike",),
    "traindiag.rules.stability": ("TaskGap",),
    "traindiag.rules.threshold": ("Threshold",),
    "traindiag.rules.trend": ("Trend",),
    "traindiag.rules.vanishing": ("Vanishing",),
    "traindiag.rules.plasticity": ("EarlyLoss", "LostPlasticity", "PlasticityPlateau"),
    "traindiag.rules.resumed": ("OptimizerStateLost",),
    "traindiag.rules.second_moment": ("StaleSecondMoment",),
    "traindiag.rules.loss_surge": ("LossSurge",),
    "traindiag.rules.output_drift": ("OutputDrift",),
    "traindiag.rules.growth": ("Growth",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        close = difflib.get_close_matches(name, __all__, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module 'traindiag' has no attribute {name!r}.{hint}")
    home = _HOME_OF[name]
    try:
        module = import_module(home)
    except ImportError:
        if home != "traindiag.lightning":
            raise
        try:  # Lightning may be installed under its other name only
            module = import_module("traindiag.pytorch_lightning")
        except ImportError:
            module = None
        if module is None:
            raise
    value = getattr(module, name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
