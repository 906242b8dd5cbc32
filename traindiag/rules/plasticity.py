"""Whether a critic loses its plasticity, and whether it has kept it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from traindiag.record.cells import Cell
from traindiag.record.frame import Frame
from traindiag.rules import arguments
from traindiag.rules.plasticity_panel import ACTIVE_LEFT, PlasticityPanel, Sign, Stages, finite_cells
from traindiag.rules.rule import Rule, Severity, Verdict
from traindiag.rules.wording import number

_FAU = "plasticity/fau_pooled"

COOLDOWN = 2000
"""Steps of rest that end an event: a few looks, which are hundreds of updates apart."""


class _ByModule(Rule):
    """A rule that speaks of the worst module."""

    patient = True
    kind = "stage"

    def __init__(self, name: str, cooldown: int) -> None:
        arguments.at_least(0, cooldown=cooldown)
        self.name, self.cooldown = name, cooldown
        self._active = False

    def _told(self, frame: Frame, found: Sequence[tuple[float, str, Severity, Sign, str]]) -> Sequence[Verdict]:
        """One verdict for all modules, each ``(badness, module, severity, sign, evidence)``; one at the end."""
        if found:
            self._active = True
            _, module, severity, sign, evidence = max(found, key=lambda x: (x[0], x[1]))
            cell = Cell(("module",), (module,))
            return (
                Verdict(
                    self.name,
                    self.kind,
                    sign.signal,
                    frame.step,
                    severity=severity,
                    cell=cell,
                    value=sign.value,
                    limit=sign.limit,
                    others=len(found) - 1,
                    evidence=evidence,
                    cooldown=self.cooldown,
                ),
            )
        if not self._active:
            return ()
        self._active = False
        return (Verdict(self.name, self.kind, self.signals[0], frame.step, active=False, cooldown=self.cooldown),)


class EarlyLoss(_ByModule):
    """Speaks when most active units are lost early and do not come back.

    A fraction of active units that falls early and does not recover ends in a network that cannot be trained any
    more, and measures that work before the fall do not work after it; a slow decline late in training is harmless
    (Ma et al. 2024, arXiv 2310.07418 section 5). So it speaks where the mean over the last ``window`` looks has been
    below ``left`` of the first one for ``persistence`` looks in a row, is not recovering, and came there early: in
    the first ``early`` of the run, or, where its length is not known, before it ever kept ``healthy`` of the first
    value on a plateau.

    It is critical where another sign of the panel speaks too, and a warning alone: the fraction of active units is an
    upper limit on what is left, and no signal of this family is right in every environment (Lyle et al. 2023, arXiv
    2303.01486).

    Args:
        left: Share of the first fraction that is too little.
        window: Looks in a mean.
        band: Change from one window to the next, in units of the first value, that counts.
        persistence: Looks in a row.
        early: Share of the run.
        healthy: Share of the first fraction that is a healthy plateau.
        cooldown: Steps of rest that end the event.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.
    """

    signals = PlasticityPanel.signals

    def __init__(
        self,
        *,
        left: float = ACTIVE_LEFT,
        window: int = 3,
        band: float = 0.02,
        persistence: int = 3,
        early: float = 0.3,
        healthy: float = 0.8,
        cooldown: int = COOLDOWN,
        name: str = "plasticity/early-loss",
    ) -> None:
        super().__init__(name, cooldown)
        arguments.share(left=left, early=early, healthy=healthy)
        arguments.above(0.0, band=band)
        arguments.at_least(1, window=window, persistence=persistence)
        self.left, self.window, self.band, self.persistence = left, window, band, persistence
        self.early, self.healthy = early, healthy
        self._panel = PlasticityPanel()
        self._modules: dict[str, dict[str, Any]] = {}
        self._stages: dict[str, Stages] = {}

    def update(self, frame: Frame) -> Sequence[Verdict]:
        if "plasticity/updates" not in frame.readings:
            return ()
        signs = self._panel.look(frame)
        found: list[tuple[float, str, Severity, Sign, str]] = []
        for (module, *_), value in finite_cells(frame, _FAU):
            stages = self._stages.setdefault(module, Stages(self.window, self.band))
            known = self._modules.setdefault(module, {"low": 0, "fell": None, "calm": 0, "settled": False})
            stage, level = stages.take(value), stages.level()
            if level is None or stages.first is None:
                continue
            known["calm"] = known["calm"] + 1 if stage == "plateau" and level >= self.healthy else 0
            known["settled"] = known["settled"] or known["calm"] >= self.window
            if level >= self.left:
                known["low"], known["fell"] = 0, None
                continue
            known["low"] += 1
            if known["fell"] is None:
                known["fell"] = self._is_early(frame, known["settled"])
            if known["low"] < self.persistence or not known["fell"] or stage == "recovering" or stages.rises():
                continue
            others = [s for s in signs.get(module, ()) if s.kind not in ("activity", "norm")]
            severity: Severity = "critical" if others else "warning"
            limit = self.left * stages.first
            value = level * stages.first
            evidence = (
                f"{_FAU} is {number(value)}, {level:.0%} of the {number(stages.first)} that it was at first, for "
                f"{known['low']} looks, and not coming back" + "".join(f"; {s.words}" for s in others)
            )
            found.append((1 - level, module, severity, Sign("activity", _FAU, value, limit, ""), evidence))
        return self._told(frame, found)

    def _is_early(self, frame: Frame, settled: bool) -> bool:
        if frame.run.length is not None:
            # Lightning plans in updates of all optimizers, of which there may be several in a step
            return max(frame.step, sum(frame.updates.values())) <= self.early * frame.run.length
        return not settled

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self._active,
            "panel": self._panel.state_dict(),
            "modules": {name: dict(known) for name, known in self._modules.items()},
            "stages": {name: stages.state_dict() for name, stages in self._stages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._active = bool(state["active"])
        self._panel.load_state_dict(state["panel"])
        self._modules = {name: dict(known) for name, known in state["modules"].items()}
        self._stages = _loaded(state["stages"], self.window, self.band)


class PlasticityPlateau(_ByModule):
    """Takes a note when the fraction of active units stays where it is at a healthy level.

    That is when Ma et al. (2024, arXiv 2310.07418 section 6) raise the replay ratio. A dead critic is flat too, so
    the level must be ``healthy`` of the first one at least, which their test does not ask for.

    Args:
        healthy: Share of the first fraction of active units.
        window: Looks in a mean.
        band: Change from one window to the next, in units of the first value, that counts.
        persistence: Looks in a row.
        cooldown: Steps of rest that end the event.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.
    """

    signals = (_FAU,)

    def __init__(
        self,
        *,
        healthy: float = 0.8,
        window: int = 3,
        band: float = 0.02,
        persistence: int = 3,
        cooldown: int = COOLDOWN,
        name: str = "plasticity/plateau",
    ) -> None:
        super().__init__(name, cooldown)
        arguments.share(healthy=healthy)
        arguments.above(0.0, band=band)
        arguments.at_least(1, window=window, persistence=persistence)
        self.healthy, self.window, self.band, self.persistence = healthy, window, band, persistence
        self._stages: dict[str, Stages] = {}
        self._calm: dict[str, int] = {}

    def update(self, frame: Frame) -> Sequence[Verdict]:
        cells = finite_cells(frame, _FAU)
        if not cells:
            return ()
        found: list[tuple[float, str, Severity, Sign, str]] = []
        for (module, *_), value in cells:
            stages = self._stages.setdefault(module, Stages(self.window, self.band))
            stage, level = stages.take(value), stages.level()
            calm = stage == "plateau" and level is not None and level >= self.healthy
            self._calm[module] = self._calm.get(module, 0) + 1 if calm else 0
            if self._calm[module] >= self.persistence and level is not None and stages.first is not None:
                value = level * stages.first
                sign = Sign("activity", _FAU, value, self.healthy * stages.first, "")
                evidence = (
                    f"{_FAU} stays at {number(value)}, {level:.0%} of the {number(stages.first)} that it was at first"
                )
                found.append((-level, module, "info", sign, evidence))
        return self._told(frame, found)

    def state_dict(self) -> dict[str, Any]:
        stages = {name: stages.state_dict() for name, stages in self._stages.items()}
        return {"active": self._active, "stages": stages, "calm": dict(self._calm)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._active, self._calm = bool(state["active"]), dict(state["calm"])
        self._stages = _loaded(state["stages"], self.window, self.band)


class LostPlasticity(_ByModule):
    """Speaks when several signs of lost plasticity that are not of one kind come together.

    Weight norm, ranks and dead units each go with loss of plasticity in some environments and against it in others
    (Lyle et al. 2023, arXiv 2303.01486), so one of them is a note, two of different kinds are a warning, and three
    beside the weight norm are critical.

    Args:
        cooldown: Steps of rest that end the event.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.
    """

    kind = "panel"
    signals = PlasticityPanel.signals

    def __init__(self, *, cooldown: int = COOLDOWN, name: str = "plasticity/panel") -> None:
        super().__init__(name, cooldown)
        self._panel = PlasticityPanel()

    def update(self, frame: Frame) -> Sequence[Verdict]:
        if "plasticity/updates" not in frame.readings:
            return ()
        found: list[tuple[float, str, Severity, Sign, str]] = []
        for module, signs in self._panel.look(frame).items():
            if signs:
                strong = sum(s.kind != "norm" for s in signs)
                severity: Severity = "critical" if strong > 2 else "warning" if len(signs) > 1 else "info"
                words = "; ".join(s.words for s in signs)
                found.append((len(signs), module, severity, signs[0], words))
        return self._told(frame, found)

    def state_dict(self) -> dict[str, Any]:
        return {"active": self._active, "panel": self._panel.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._active = bool(state["active"])
        self._panel.load_state_dict(state["panel"])


def _loaded(state: Mapping[str, Any], window: int, band: float) -> dict[str, Stages]:
    stages = {name: Stages(window, band) for name in state}
    for name, kept in state.items():
        stages[name].load_state_dict(kept)
    return stages
