"""Reads a :class:`RunInfo` off a model and its optimizers. Reads only: no user code is called."""

from __future__ import annotations

import functools
import platform
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, SequentialLR

from traindiag.capture.blocks import stacks_of
from traindiag.capture.watched import Watched
from traindiag.record.frame import Reading
from traindiag.record.run_info import OptimizerInfo, RunInfo
from traindiag.transfer.ranks import world_size

_PACKAGES = ("traindiag", "torch", "lightning", "transformers", "numpy")
_QUERY_KEY_NORM = re.compile(r"(^|[._])(q|k|qk|query|key)_?(layer_?|rms_?)?norm|(^|[._])(q|k)_ln|norm_?(q|k)$", re.I)


def run_facts(
    watched: Watched,
    models: Sequence[nn.Module],
    schedulers: Iterable[object] = (),
    **known: Any,
) -> RunInfo:
    """What can be known before the first step.

    Args:
        watched: What is trained.
        models: The models as the user gave them.
        schedulers: Learning-rate schedulers.
        known: Fields that the caller knows, such as ``length`` or ``precision``; they win.
    """
    parameters = {id(p): p for model in models for p in model.parameters()}
    embeddings = {
        id(p) for model in models for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    trained = {id(p) for ps in watched.parameters.values() for _, p in ps}
    usual = [s for s in schedulers if isinstance(s, LRScheduler)]
    facts = RunInfo(
        model=" + ".join(type(m).__name__ for m in models),
        parameters=sum(p.numel() for p in parameters.values()),
        parameters_without_embeddings=sum(p.numel() for key, p in parameters.items() if key not in embeddings),
        trainable_parameters=sum(p.numel() for key, p in parameters.items() if key in trained),
        depth=_depth(models),
        width=_width(models),
        optimizers=tuple(_optimizer_info(name, o, usual) for name, o in watched.optimizers.items()),
        warmup=next((w for s in usual if (w := _warmup(s)) is not None), None),
        normalisation=_normalisation(models),
        loaded_weights=_loaded_weights(models),
        seed=torch.initial_seed(),
        world_size=world_size(),
        device=next((p.device.type for p in parameters.values()), None),
        versions=_versions(),
    )
    return replace(facts, **{k: v for k, v in known.items() if v is not None})


def with_attention(facts: RunInfo, reading: Reading) -> RunInfo:
    """Depth and heads as the first attention sample showed them."""
    heads = Counter(str(layer) for layer, _ in reading.cells.coordinates)
    if not heads:
        return facts
    return replace(facts, depth=len(heads), heads=heads.most_common(1)[0][1])


def _optimizer_info(name: str, optimizer: Optimizer, schedulers: Sequence[LRScheduler]) -> OptimizerInfo:
    group = optimizer.param_groups[0]
    # some frameworks schedule a wrapper around the optimizer
    scheduler = next((s for s in schedulers if optimizer in (o := s.optimizer, getattr(o, "optimizer", None))), None)
    peaks = [float(g[key]) for g in optimizer.param_groups for key in ("lr", "initial_lr", "max_lr") if key in g]
    return OptimizerInfo(
        name=name,
        kind=type(optimizer).__name__,
        settings={k: _plain(v) for k, v in group.items() if k != "params" and _plain(v) is not None},
        parameters=sum(p.numel() for g in optimizer.param_groups for p in g["params"]),
        groups=len(optimizer.param_groups),
        peak_lr=max(peaks, default=None),
        schedule=type(scheduler).__name__ if scheduler is not None else None,
    )


def _plain(value: Any) -> bool | int | float | str | list[float] | None:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(v, (int, float)) for v in value):
        return list(value)
    return None  # a tensor setting (capturable optimizers) would need a wait for the device


def _warmup(scheduler: LRScheduler) -> int | None:
    """Steps until the peak, where the scheduler states them; user functions are not called to find out."""
    if isinstance(scheduler, OneCycleLR):
        phases = getattr(scheduler, "_schedule_phases", None)
        return int(phases[0]["end_step"]) if phases else None
    if isinstance(scheduler, SequentialLR):
        milestones = getattr(scheduler, "_milestones", None)
        return int(milestones[0]) if milestones else None
    for function in getattr(scheduler, "lr_lambdas", ()):
        if isinstance(function, functools.partial) and "num_warmup_steps" in function.keywords:
            return int(function.keywords["num_warmup_steps"])
    return None


def _depth(models: Sequence[nn.Module]) -> int | None:
    """Length of the longest stack of blocks."""
    return max((len(stack) for model in models for stack in stacks_of(model)), default=None)


def _width(models: Sequence[nn.Module]) -> int | None:
    """The size that most normalisation layers have, or that of the embedding."""
    sizes = Counter(
        p.shape[-1]
        for model in models
        for m in model.modules()
        if _is_norm(m) and not list(m.children())
        for p in list(m.parameters())[:1]
        if p.dim() == 1
    )
    if sizes:
        return int(sizes.most_common(1)[0][0])
    embedded = [m.embedding_dim for model in models for m in model.modules() if isinstance(m, nn.Embedding)]
    return int(embedded[0]) if embedded else None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _normalisation(models: Sequence[nn.Module]) -> dict[str, int]:
    """Classes of normalisation layers with their number; those on queries and keys also as ``query_key``."""
    found: Counter[str] = Counter()
    for model in models:
        for name, module in model.named_modules():
            leaf = not list(module.children())
            if leaf and not isinstance(module, nn.Identity) and (_is_norm(module) or _QUERY_KEY_NORM.search(name)):
                found[type(module).__name__] += 1
                found["query_key"] += bool(_QUERY_KEY_NORM.search(name))
    return {kind: number for kind, number in found.items() if number}


def _loaded_weights(models: Sequence[nn.Module]) -> bool | None:
    """Known for Hugging Face models, which remember where they came from."""
    origins = [getattr(m, "name_or_path", None) for model in models for m in model.modules() if hasattr(m, "config")]
    told = [o for o in origins if isinstance(o, str)]
    return any(told) if told else None


def _versions() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def shared_run_id() -> str:
    """A fresh identifier, the first rank's on all ranks: alert ids are made of it."""
    identifier = [secrets.token_hex(6)]
    if world_size() > 1:
        dist.broadcast_object_list(identifier, src=0)
    return identifier[0]
