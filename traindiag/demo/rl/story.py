"""What happened to two agents, in words and measured numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from traindiag.alerts.alert import Alert
from traindiag.demo.rl.run import CHUNK, EPISODES, Outcome
from traindiag.record.series import History

MARGIN = 200.0
"""How far below a healthy return counts as suffering: a sixth of what lies between a random and a good agent."""

GRID = 100
"""Environment steps between the points at which returns are compared."""

Returns = Sequence[tuple[int, float]]


def recent(returns: Returns, step: int) -> float | None:
    """Mean return of the last ten episodes that had ended by an environment step; None before the first.

    Example:
        >>> recent([(10, 1.0), (20, 3.0)], 25)
        2.0
    """
    ended = bisect_right([s for s, _ in returns], step)
    last = [value for _, value in returns[max(0, ended - EPISODES) : ended]]
    return sum(last) / len(last) if last else None


def onset(returns: Returns, healthy: Sequence[Returns], steps: int, margin: float = MARGIN) -> int | None:
    """Environment step from which a return stays more than ``margin`` below the worst of healthy runs.

    Args:
        returns: Step at which each episode ended, and its return.
        healthy: The same of runs that learn.
        steps: Length of all runs.
        margin: In units of the return.

    Returns:
        None where it ends among them.

    Example:
        >>> good = [(s, min(s, 500)) for s in range(100, 1001, 100)]
        >>> onset([(s, 100) for s in range(100, 1001, 100)], [good], steps=1000, margin=100)
        400
    """
    found = None
    for step in range(GRID, steps + 1, GRID):
        mine, others = recent(returns, step), [recent(r, step) for r in healthy]
        known = [o for o in others if o is not None]
        below = mine is not None and len(known) == len(others) and mine < min(known) - margin
        found = (step if found is None else found) if below else None
    return found


@dataclass(frozen=True, slots=True)
class Story:
    """The facts of one agent.

    Args:
        outcome: The run.
        alerts: Everything that was told.
        numbers: Signals of plasticity at the first look and at the last, by name without the family; of several
            layers the worst.
    """

    outcome: Outcome
    alerts: tuple[Alert, ...]
    numbers: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, outcome: Outcome, alerts: Sequence[Alert], history: History) -> Story:
        """Reads what the diagnostics have measured."""
        numbers = {}
        for name in ("fau_pooled", "dead"):
            if f"plasticity/{name}" in history:
                values = history[f"plasticity/{name}"].values.max(axis=1)
                numbers[name] = (float(values[0]), float(values[-1]))
        return cls(outcome, tuple(alerts), numbers)

    @property
    def warning(self) -> Alert | None:
        """The first one about plasticity at WARNING or above."""
        told = (a for a in self.alerts if a.status != "closed" and a.severity != "info")
        return next((a for a in told if a.family == "plasticity"), None)

    @property
    def warned_at(self) -> int | None:
        """Environment step of that warning."""
        return None if self.warning is None else self.outcome.settings.env_step(self.warning.step)

    @property
    def others(self) -> int:
        """Events of other families at WARNING or above."""
        told = (a for a in self.alerts if a.status != "closed" and a.severity != "info")
        return len({a.id for a in told if a.family != "plasticity"})

    def lines(self, healthy: Story | None = None) -> list[tuple[str, str]]:
        """The story as pairs of a label and a sentence; beside a healthy agent where there is one."""
        lines = [("warned", self._warned()), ("critic", self._critic())]
        steps = self.outcome.settings.steps
        if healthy is not None:
            suffered = onset(self.outcome.returns, [healthy.outcome.returns], steps)
            if suffered is None:
                lines.append(("return", f"ended within {MARGIN:g} of the healthy agent's"))
            else:
                told = f"stays more than {MARGIN:g} below the healthy agent's from environment step {suffered:,} on"
                lead = "" if self.warned_at is None else f", {suffered - self.warned_at:,} after the warning"
                lines.append(("return", told + lead))
        end = f"return {self.outcome.last:,.0f} over the last {EPISODES} episodes"
        if healthy is not None:
            end += f"; the healthy agent has {healthy.outcome.last:,.0f}"
        return [*lines, ("at the end", end)]

    def _warned(self) -> str:
        others = f"; {self.others} of other families" if self.others else ""
        if self.warning is None:
            return f"never about plasticity: nothing at WARNING or above{others}"
        a, settings = self.warning, self.outcome.settings
        updates = (a.step + 1 - settings.primed.start) * CHUNK
        when = f"after {updates:,} updates of priming" if a.step in settings.primed else "while it learnt"
        return f"{when}, at environment step {self.warned_at:,}, {a.severity}: {a.title}{others}"

    def _critic(self) -> str:
        words = {
            "fau_pooled": "active units {0:.0%} at first, {1:.0%} at the end",
            "dead": "dead units in its worst layer {0:.0%} at first, {1:.0%} at the end",
        }
        return "; ".join(words[name].format(*self.numbers[name]) for name in words if name in self.numbers)
