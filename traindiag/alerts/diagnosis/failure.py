"""What a diagnosis is made of: a :class:`Case`, the :class:`Failure` that it may be, and what was found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from traindiag.alerts.alert import Remedy
from traindiag.alerts.diagnosis.memory import Level, Memory
from traindiag.record.frame import Frame
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.rules.rule import Verdict

TOGETHER = 8
"""Steps within which two verdicts are about the same thing: loss spikes come 1 to 8 steps after the second moment
was left behind (arXiv 2304.13013)."""


@dataclass
class Witness:
    """What one rule says.

    Args:
        last: Its last active verdict.
        since: Step of its first one.
        ended: Step at which it said that its condition has ended; None while it holds.
    """

    last: Verdict
    since: int
    ended: int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A verdict and everything that may explain it.

    Args:
        verdict: The verdict.
        frame: The frame that it is about.
        memory: What was seen before, this frame included.
        witnesses: What all rules say now or said at most ``TOGETHER`` steps ago, this verdict's rule included.
        since: First step of this verdict's condition.
        diagnoses: Names of the failures whose events are open.
    """

    verdict: Verdict
    frame: Frame
    memory: Memory
    witnesses: tuple[Witness, ...] = ()
    since: int = 0
    diagnoses: tuple[str, ...] = ()

    @property
    def run(self) -> RunInfo:
        """Facts of the run; a learning rate that was raised beyond its planned peak is the peak."""
        run, rates = self.frame.run, self.frame.learning_rates
        if not self.raised(1.0):
            return run
        optimizers = (replace(o, peak_lr=max(o.peak_lr or 0.0, rates.get(o.name, 0.0))) for o in run.optimizers)
        return replace(run, optimizers=tuple(optimizers))

    def raised(self, factor: float) -> tuple[tuple[float, float], ...]:
        """Learning rate and planned peak of each optimizer whose rate is ``factor`` times its peak and more."""
        rates = self.frame.learning_rates
        pairs = ((rates.get(o.name, 0.0), o.peak_lr) for o in self.frame.run.optimizers)
        return tuple((rate, peak) for rate, peak in pairs if peak is not None and peak > 0 and rate > factor * peak)

    def by(self, *signals: str, kinds: Sequence[str] = ()) -> Witness | None:
        """The first other witness on one of these signals (globs), of one of these kinds."""
        for witness in self.witnesses:
            said = witness.last
            if said.rule == self.verdict.rule or (kinds and said.kind not in kinds):
                continue
            if any(fnmatchcase(said.signal, s) for s in signals):
                return witness
        return None

    def now(self, signal: str) -> Level | None:
        return self.memory.now(signal)

    def healthy(self, signal: str) -> Level | None:
        return self.memory.healthy(signal)

    def grown(self, signal: str) -> float | None:
        """The largest value now as a multiple of the smaller of what it was at first and earlier in the run."""
        now, sights = self.memory.now(signal), (self.before(signal), self.memory.earlier(signal))
        least = [s.high for s in sights if s is not None and s.high > 0]
        return now.high / min(least) if now and least else None

    def before(self, signal: str) -> Level | None:
        """The level to hold the present one against: the first, unless that is this one."""
        now, first = self.memory.now(signal), self.memory.first(signal)
        return first if first is not None and now is not None and first.step < now.step else None

    def optimizers(self) -> tuple[OptimizerInfo, ...]:
        """The optimizer that the verdict's cell names, otherwise all of them."""
        cell = self.verdict.cell
        if "optimizer" in cell.axes:
            name = cell.coordinates[cell.axes.index("optimizer")]
            own = tuple(o for o in self.run.optimizers if o.name == name)
            return own or self.run.optimizers
        return self.run.optimizers

    @property
    def at(self) -> str:
        """`` at <cell>``, or nothing where the signal has no cells."""
        return f" at {self.verdict.cell}" if self.verdict.cell.coordinates else ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The words of an alert.

    Args:
        title: One line.
        cause: What usually brings this about.
        evidence: What speaks for it beside the verdict, each with its number and step.
        ruled_out: Causes that a number excludes, with that number.
        remedies: Best first.
        witnesses: Rules whose verdicts it explains too.
    """

    title: str
    cause: str = ""
    evidence: tuple[str, ...] = ()
    ruled_out: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    witnesses: tuple[str, ...] = ()


class Failure(ABC):
    """One named way in which training goes wrong. It reads signals and kinds, and never the name of a rule."""

    name: str
    """In the field's words; events are kept by it."""
    family: str
    """The family that has to be treated; that of the signal may be another one."""
    signals: tuple[str, ...]
    """Globs of the signals whose verdicts it may explain."""
    kinds: tuple[str, ...] = ()
    """Kinds of verdict that it may explain; all where empty."""

    def explains(self, verdict: Verdict) -> bool:
        """Whether :meth:`diagnose` is worth asking."""
        if self.kinds and verdict.kind not in self.kinds:
            return False
        return any(fnmatchcase(verdict.signal, signal) for signal in self.signals)

    @abstractmethod
    def diagnose(self, case: Case) -> Finding | None:
        """What it is, or None where the numbers say otherwise."""


def rules_of(*witnesses: Witness | None) -> tuple[str, ...]:
    """Names of the rules of those witnesses that are there."""
    return tuple(w.last.rule for w in witnesses if w is not None)
