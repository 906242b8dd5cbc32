"""What is being trained, as far as it can be known: rules and remedies read their concrete values here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class OptimizerInfo:
    """One optimizer as the run began.

    Args:
        name: The name that cells carry.
        kind: Class name, such as ``AdamW``.
        settings: Plain numbers and switches of the first parameter group (``lr``, ``betas``, ``eps``, ...).
        parameters: Number of scalars that it trains.
        groups: Number of parameter groups.
        peak_lr: Largest learning rate of the schedule if it is known, otherwise the initial one.
        schedule: Class name of the scheduler, or None.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    groups: int = 1
    peak_lr: float | None = None
    schedule: str | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Facts about a run. Every field may be None: unknown is not zero.

    Args:
        run_id: One identifier for all segments of a run.
        model: Class name of the model.
        parameters: Trainable and frozen scalars.
        parameters_without_embeddings: The same less token and position embeddings.
        trainable_parameters: Scalars that an optimizer owns.
        depth: Number of attention layers, or of repeated blocks.
        width: Size of the residual stream.
        heads: Query heads of a layer.
        optimizers: One entry an optimizer.
        length: Planned optimizer steps.
        warmup: Steps until the schedule reaches its peak.
        batch_size: Samples a micro-batch on one rank.
        accumulate: Micro-batches a step.
        clip: Gradient clipping as ``(algorithm, limit)``.
        precision: ``32-true``, ``bf16-mixed``, ...
        normalisation: Kinds of normalisation layer found, with their number.
        loaded_weights: Whether training began from weights that had been trained before.
        seed: The seed, where one is known.
        world_size: Number of ranks.
        device: Device type.
        versions: Package versions.
        silenced: Default rules that the user keeps from judging, with the reason for each.
    """

    run_id: str = ""
    model: str | None = None
    parameters: int | None = None
    parameters_without_embeddings: int | None = None
    trainable_parameters: int | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    optimizers: tuple[OptimizerInfo, ...] = ()
    length: int | None = None
    warmup: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    clip: tuple[str, float] | None = None
    precision: str | None = None
    normalisation: Mapping[str, int] = field(default_factory=dict)
    loaded_weights: bool | None = None
    seed: int | None = None
    world_size: int = 1
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    silenced: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunInfo:
        """Reads :meth:`to_dict` back; fields of a newer version are left out.

        Example:
            >>> RunInfo.from_dict(RunInfo(run_id="a", length=100).to_dict()).length
            100
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        inner = {f.name for f in fields(OptimizerInfo)}
        values["optimizers"] = tuple(
            OptimizerInfo(**{k: v for k, v in o.items() if k in inner}) for o in values.get("optimizers", ())
        )
        if values.get("clip") is not None:
            values["clip"] = tuple(values["clip"])
        return cls(**values)
