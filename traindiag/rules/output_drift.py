"""Output logits that drift without telling tokens apart any better."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from traindiag.record.cells import Cell, Coordinate
from traindiag.record.frame import Frame, Reading
from traindiag.rules import arguments
from traindiag.rules.rule import COOLDOWN, NOWHERE, Rule, Severity, Verdict
from traindiag.rules.wording import number

EARLY = 3
"""Samples that the early level is taken from: at initialisation log Z is about the logarithm of the classes."""

CERTAIN = 40.0
"""Nats that no gradient asks for: in float32 that of cross-entropy is zero once the target leads by 17."""

_DRIFT, _GAIN, _SURE = "output/log_z_max_abs", "output/target_z_score", "output/overconfidence"


class OutputDrift(Rule):
    """Speaks while log Z moves away from zero, the target's z-score does not gain, and the model is too sure.

    Cross-entropy leaves a common shift of the logits free. While a model learns, log Z may grow with what it knows;
    the z-score of the target in its logits, which neither shift nor scale can change, then grows too. A classifier
    that is right nearly always goes on growing its logits when its z-score has reached what it can reach, because
    larger ones still lower the loss: its overconfidence, the derivative of the loss by their scale, is below zero.
    Drift that brings no gain and makes the loss worse is the beginning of output-logit divergence.

    Of each call site the last ``window`` samples are held against the first three: the median of the largest
    |log Z| must be ``factor`` times as large and at least ``above``, it must still be growing within the window,
    the median z-score of the window's newer half must not be more than ``gain`` above that of its older half, and
    overconfidence must be above zero in all samples but one, unless log Z is beyond ``certain``.

    A level that is large from the beginning and only scatters, around 20 nats and log-normal, with a z-score that
    gains nothing and overconfidence as often above zero as below, is not told in 10,000 samples at sigma 0.15 and
    twice at 0.35; twice and 52 times where all three wander (AR(0.9)).

    Args:
        factor: Ratio of |log Z| to its early level that is too much.
        above: Least |log Z| that counts, in nats.
        certain: |log Z| from which on growth is none that the loss asks for, whatever overconfidence says or where it
            is not measured.
        gain: Relative gain of the z-score within the window that explains a drift.
        window: Samples of a site that are looked at together.
        persistence: Samples in a row that must show it.
        cooldown: Steps of rest that end the event.
        severity: Severity of the verdict.
        name: Name of the rule, which must be unique.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Wortsman et al. 2023, arXiv 2309.14322 section 3.1.2: output logits diverge late in runs without weight decay
        or z-loss.
    """

    signals = (_DRIFT, _GAIN, _SURE)

    def __init__(
        self,
        *,
        factor: float = 1.6,
        above: float = 12.0,
        certain: float = CERTAIN,
        gain: float = 0.02,
        window: int = 6,
        persistence: int = 2,
        cooldown: int = COOLDOWN,
        severity: Severity = "warning",
        name: str = "output/drift",
    ) -> None:
        arguments.above(1.0, factor=factor)
        arguments.above(0.0, above=above, certain=certain, gain=gain)
        arguments.at_least(4, window=window)
        arguments.at_least(1, persistence=persistence)
        arguments.at_least(0, cooldown=cooldown)
        arguments.severity(severity)
        self.factor, self.above, self.certain, self.gain = factor, above, certain, gain
        self.window, self.persistence, self.cooldown = window, persistence, cooldown
        self.severity, self.name = severity, name
        self._sites: dict[str, _Site] = {}
        self._active = False

    def update(self, frame: Frame) -> Sequence[Verdict]:
        drift, gain = frame.readings.get(_DRIFT), frame.readings.get(_GAIN)
        if drift is None or gain is None:
            return ()
        scores, sure = _by_site(gain), _by_site(frame.readings.get(_SURE))
        found: list[tuple[float, str, Cell, float, float, float]] = []
        for i, (at, value) in enumerate(zip(drift.cells.coordinates, drift.values.tolist())):
            score, place = scores.get(at, np.nan), str(at[0]) if at else ""
            if not (drift.seen[i] and np.isfinite(value) and np.isfinite(score)):
                continue
            site = self._sites.setdefault(place, _Site(self.window))
            site.take(value, score, sure.get(at, np.nan))
            ratio, gained = site.ratio(), site.gain()
            shows = (
                ratio is not None
                and ratio >= self.factor
                and site.now() >= self.above
                and site.grows()
                and gained <= self.gain
                and (site.now() >= self.certain or site.too_sure())
            )
            site.streak = site.streak + 1 if shows else 0
            if site.streak >= self.persistence and ratio is not None:
                found.append((ratio, place, drift.cells[i], value, site.now(), gained))
        if found:
            self._active = True
            ratio, _, cell, value, now, gained = max(found)
            evidence = (
                f"{_DRIFT} is {number(now)} nats, {number(ratio)} times its early level, while {_GAIN} gained "
                f"{gained:.1%} in the last {self.window} samples"
            )
            if (excess := self._sites[place].excess()) is not None:
                evidence += f" and the loss lies {number(excess)} nats above the entropy of the prediction"
            return (self._verdict(frame, cell, value, now / ratio * self.factor, evidence, len(found) - 1),)
        if not self._active or any(site.streak for site in self._sites.values()):
            return ()
        self._active = False
        return (self._verdict(frame, NOWHERE, float("nan"), None, "output logits drift no more", active=False),)

    def _verdict(
        self,
        frame: Frame,
        cell: Cell,
        value: float,
        limit: float | None,
        evidence: str,
        others: int = 0,
        active: bool = True,
    ) -> Verdict:
        return Verdict(
            self.name,
            "trend",
            _DRIFT,
            frame.step,
            active,
            self.severity,
            cell,
            value,
            limit,
            others,
            evidence=evidence,
            cooldown=self.cooldown,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"active": self._active, "sites": {name: site.state_dict() for name, site in self._sites.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._active = bool(state["active"])
        self._sites = {}
        for name, kept in state["sites"].items():
            self._sites[name] = _Site(self.window)
            self._sites[name].load_state_dict(kept)


def _by_site(reading: Reading | None) -> dict[tuple[Coordinate, ...], float]:
    """Values by cell; what was not seen is NaN."""
    if reading is None:
        return {}
    return dict(zip(reading.cells.coordinates, np.where(reading.seen, reading.values, np.nan).tolist()))


class _Site:
    """First and last samples of one call site."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.early: list[float] = []
        self.drifts: deque[float] = deque(maxlen=window)
        self.scores: deque[float] = deque(maxlen=window)
        self.sure: deque[float] = deque(maxlen=window)
        self.streak = 0

    def take(self, drift: float, score: float, sure: float) -> None:
        if len(self.early) < EARLY:
            self.early.append(drift)
        self.drifts.append(drift)
        self.scores.append(score)
        self.sure.append(sure)

    def ratio(self) -> float | None:
        """To the early level; None while the window is not full or that level is zero."""
        if len(self.drifts) < self.window:
            return None
        level = median(self.early)
        return self.now() / level if level > 0 else None

    def now(self) -> float:
        return median(self.drifts)

    def grows(self) -> bool:
        older, newer = self._halves(self.drifts)
        return newer > older

    def gain(self) -> float:
        older, newer = self._halves(self.scores)
        return (newer - older) / abs(older) if older else float("inf")

    def too_sure(self) -> bool:
        """Whether smaller logits would have been better ones in all samples but one."""
        return sum(s > 0 for s in self.sure) >= self.window - 1

    def excess(self) -> float | None:
        """Overconfidence of the window; None where it says nothing."""
        known = [s for s in self.sure if s == s]
        return median(known) if known and median(known) > 0 else None

    def _halves(self, values: deque[float]) -> tuple[float, float]:
        half, every = len(values) // 2, list(values)
        return median(every[:half] or every), median(every[half:])

    def state_dict(self) -> dict[str, Any]:
        return {
            "early": list(self.early),
            "drifts": list(self.drifts),
            "scores": list(self.scores),
            "sure": list(self.sure),
            "streak": self.streak,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early, self.streak = list(state["early"]), int(state["streak"])
        self.drifts.extend(state["drifts"])
        self.scores.extend(state["scores"])
        self.sure.extend(state.get("sure", [float("nan")] * len(self.scores)))
