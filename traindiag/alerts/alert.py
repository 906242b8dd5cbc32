"""What the user is told: :class:`Alert` and its :class:`Remedy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from traindiag.rules.rule import Severity

SCHEMA_VERSION = 1
Status = Literal["opened", "escalated", "closed"]
Span = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing to do.

    Args:
        text: What, in one sentence with its value.
        change: Settings to change, such as ``{"optimizer.lr": 0.03}``.
        when: ``now`` in the running job, at a ``restart`` from a checkpoint, or in the ``next run``.
        source: Why it should help.
    """

    text: str
    change: Mapping[str, Any] = field(default_factory=dict)
    when: Literal["now", "restart", "next run"] = "next run"
    source: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """One message about one event. An event has one ``id`` and up to three kinds of message.

    Args:
        id: The same in every process: made of run, rule, cell and opening step.
        status: ``opened``, ``escalated`` or ``closed``.
        rule: Name of the rule.
        run: Run id.
        segment: Job of the run.
        step: Step that was judged.
        time: Seconds since the epoch.
        rank: Rank that the value came from, where known.
        severity: ``info``, ``warning`` or ``critical``.
        clock: ``fast`` (1-8 steps left) or ``slow`` (hundreds and more).
        family: Family of the failure, or of the signal where there is no diagnosis.
        signal: Signal judged.
        where: Worst cell, as text.
        value: Value there.
        limit: What it was held against.
        kind: ``threshold``, ``forecast``, ``nonfinite``, ...
        steps_to_limit: ``(low, mid, high)``, for a forecast.
        time_to_limit: The same in seconds, where the pace is known.
        diagnosis: Name of the failure that was found, empty where there is none; the event is about it.
        title: One line.
        evidence: Numbers that speak for it.
        cause: What usually brings this about.
        ruled_out: Causes that the evidence excludes.
        remedies: Best first.
        bundle: What led to it, once an event, as plain data: ``steps`` with loss and gradient norm at each of them
            and, where a failure is fast, ``tensors`` by their ``share`` of a jump and the last ``batches`` by step.
            Empty in all other messages.
    """

    id: str
    status: Status
    rule: str
    run: str
    segment: int
    step: int
    time: float
    rank: int | None
    severity: Severity
    clock: Literal["fast", "slow"]
    family: str
    signal: str
    where: str
    value: float
    limit: float | None
    kind: str
    steps_to_limit: Span | None = None
    time_to_limit: Span | None = None
    title: str = ""
    evidence: str = ""
    cause: str = ""
    ruled_out: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    diagnosis: str = ""
    bundle: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data under a versioned schema; non-finite numbers become ``"nan"``, ``"inf"``, ``"-inf"``.

        JSON knows no NaN, and an alert about one must survive the trip.
        """
        return {"schema": SCHEMA_VERSION, **{k: _plain(v) for k, v in asdict(self).items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """Reads :meth:`to_dict` back; fields that an older package did not write are empty.

        Raises:
            ValueError: If the schema is newer than this package.
        """
        schema = data.get("schema", SCHEMA_VERSION)
        if schema > SCHEMA_VERSION:
            raise ValueError(f"alert schema {schema} is newer than the {SCHEMA_VERSION} that this package reads")
        values = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        for key in ("value", "limit"):
            values[key] = None if values.get(key) is None else float(values[key])
        for key in ("steps_to_limit", "time_to_limit"):
            if values.get(key) is not None:
                values[key] = tuple(float(v) for v in values[key])
        values["ruled_out"] = tuple(values.get("ruled_out", ()))
        values["bundle"] = _numbers(values.get("bundle", {}))
        values["remedies"] = tuple(Remedy(**r) for r in values.get("remedies", ()))
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:  # NaN and both infinities
        return repr(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _numbers(value: Any) -> Any:
    """The reverse of :func:`_plain` for data whose only strings are names."""
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
