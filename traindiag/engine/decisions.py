"""What an alert makes the engine do at the end of a step: save, stop, raise; after the same step on all ranks.

Ranks judge the same numbers and come to the same alerts, but not always at the same moment: calm steps wait, and one
rank may be asked for its alerts in between. So what is done is due at a step that is counted from the step judged.
Among several ranks that is one step later than all have judged it: if one of them has failed meanwhile, the others
have read so by then, and leave it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from traindiag.alerts.actions import Decision, Raise, SaveCheckpoint, StopTraining
from traindiag.alerts.alert import Alert
from traindiag.engine.judge import BATCH
from traindiag.transfer.ranks import world_size

Save = Callable[[str], object]


class Decisions:
    """Keeps alerts until they are due, and does then what actions ask for.

    Args:
        actions: Those of the run; others than decisions are left out.
        save: Saves a checkpoint of a name in the way of the framework at hand; None where it has none.
        report: Told, in words, that training stops or a checkpoint could not be saved.

    Attributes:
        should_stop: Whether training is to end.

    Raises:
        ValueError: If nobody knows how to save.
    """

    def __init__(self, actions: Sequence[object], save: Save | None, report: Callable[[str], None]) -> None:
        self._actions = [a for a in actions if isinstance(a, Decision)]
        self._save, self._report = save, report
        self._waiting: list[tuple[int, Alert]] = []
        self._saved: set[tuple[str, str]] = set()
        self.should_stop = False
        for action in self._actions:
            if isinstance(action, SaveCheckpoint) and action.save is None and save is None:
                raise ValueError(
                    f"{action!r} does not know how to save in a loop of your own: pass SaveCheckpoint(save=...), a "
                    "function of a checkpoint's name"
                )

    def due(self, step: int) -> bool:
        """Whether there is something to do when ``step`` has ended."""
        return any(at <= step for at, _ in self._waiting)

    def take(self, alerts: Sequence[Alert], *, calm: bool) -> None:
        """Keeps what some decision is for.

        Args:
            alerts: What a frame has brought up.
            calm: Whether other ranks may hear it later.
        """
        for alert in alerts:
            if any(a.wants(alert) for a in self._actions):
                due = alert.step + (BATCH if calm else 0) + (1 if world_size() == 1 else 2)
                self._waiting.append((due, alert))
            if alert.status == "closed":
                self._saved -= {(alert.id, "opened"), (alert.id, "escalated")}

    def drop(self) -> None:
        """Another rank has failed before it could know of what waits here."""
        self._waiting.clear()

    def act(self, step: int, *, last: bool = False) -> Alert | None:
        """Saves and stops; an alert that is to be raised is given back.

        Args:
            step: The step that has ended.
            last: The run is over: everything is due, and nothing is left to be saved.
        """
        due = [alert for at, alert in self._waiting if at <= step or last]
        if not due:
            return None
        self._waiting = [(at, alert) for at, alert in self._waiting if not (at <= step or last)]
        if not last:
            self._save_for(due, step)
        stops = [alert for alert in due if self._wanted(StopTraining, alert)]
        if stops and not self.should_stop and not last:
            self._report(
                f"training stops after step {step}, as an action asks for: {stops[0].title or stops[0].rule}"
            )
        self.should_stop = self.should_stop or bool(stops)
        return next((alert for alert in due if self._wanted(Raise, alert)), None)

    def state_dict(self) -> dict[str, Any]:
        """What waits and what was saved, as plain data."""
        return {
            "waiting": [[due, alert.to_dict()] for due, alert in self._waiting],
            "saved": sorted(list(pair) for pair in self._saved),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        self._waiting = [(int(due), Alert.from_dict(alert)) for due, alert in state["waiting"]]
        self._saved = {(str(id_), str(status)) for id_, status in state["saved"]}

    def _wanted(self, kind: type[Decision], alert: Alert) -> list[Decision]:
        return [a for a in self._actions if isinstance(a, kind) and a.wants(alert)]

    def _save_for(self, alerts: Sequence[Alert], step: int) -> None:
        """One checkpoint for all that is due: they would all be the same."""
        savers: dict[Save, str] = {}
        for alert in alerts:
            key = (alert.id, alert.status)
            wanted = self._wanted(SaveCheckpoint, alert)
            if not wanted or key in self._saved:
                continue
            self._saved.add(key)  # before it is saved: the checkpoint is to know of itself
            rule = re.sub(r"[^\w.-]+", "-", alert.rule)
            for action in wanted:
                save = getattr(action, "save", None) or self._save
                if save is not None:
                    savers.setdefault(save, f"step-{step}-{rule}-{alert.status}")
        for save, name in savers.items():
            try:
                save(name)
            except Exception as error:
                if world_size() > 1:  # the others may wait for this rank inside of theirs, and would wait for ever
                    raise
                self._report(f"checkpoint {name!r} was not saved: {type(error).__name__}: {error}; training goes on")
