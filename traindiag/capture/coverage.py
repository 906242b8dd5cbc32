"""Which attention layers and output logits were seen, and why the others were not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from traindiag.record.coverage import Coverage, Sight

NO_CALL = "no attention call was seen in its training forward pass"
NO_LOSS = "no cross-entropy call was seen; name the head with OutputMonitor(head=...)"
NOT_CALLED = "it was not called in a training step: its logits are not built there"
HEAD_COMPILED = "compiled: its output is not seen"
NOT_SAMPLED = "not sampled yet"
LOSS_BESIDE_COMPILED = "parts of the program are compiled: losses outside of eager modules are not looked at"
COMPILED = "compiled: attention not seen"
SHADOW = "compiled: seen in a second, eager pass over two items of each batch"
COMPILED_MODULE = "compiled: outputs of modules not seen"
NOT_RETURNED = "did not return in a training forward pass"

_ELSEWHERE = ("flex", "flash", "kernels", "paged")
"""Beginnings of ``config._attn_implementation`` whose kernels show neither queries nor scores."""


def hidden_attention(module: nn.Module) -> str | None:
    """Why attention in ``module`` cannot be seen although the module itself is not compiled; None where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "inside torch.jit.script: attention not seen"
    kind = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if isinstance(kind, str) and (kind.startswith(_ELSEWHERE) or "/" in kind):
        return f"{kind} attention shows neither queries nor scores"
    return None


def looks_like_attention(module: nn.Module) -> bool:
    """By class name, or by a number of heads of its own."""
    name = str(module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__).lower()
    return "attention" in name or "attn" in name or isinstance(vars(module).get("num_heads"), int)


def attention_coverage(
    modules: Mapping[str, nn.Module],
    seen: Mapping[str, tuple[Sight, str]],
    refused: Mapping[str, str],
    hidden: Mapping[str, str],
    *,
    sampled: bool,
) -> tuple[Coverage, ...]:
    """One row per sight and reason.

    Args:
        modules: Watched modules by name.
        seen: Sight and reason of every layer that made a call.
        refused: Reason by layer where a call could not be looked at.
        hidden: Reason by module in which nothing can be seen.
        sampled: Whether a window has been open.
    """
    rows: dict[tuple[Sight, str], list[str]] = {}
    for layer, sight in seen.items():
        if layer not in refused:
            rows.setdefault(sight, []).append(layer)
    for layer, reason in refused.items():
        rows.setdefault(("unseen", reason), []).append(layer)
    known = {id(m) for n in (*seen, *refused) if n in modules for m in modules[n].modules()}
    looking = {n: m for n, m in modules.items() if looks_like_attention(m)}
    for name, module in looking.items():
        inside = [id(m) for m in module.modules()]
        if not known.isdisjoint(inside):
            continue
        if any(other is not module and id(other) in inside for other in looking.values()):
            continue  # told of the inner one
        reason = _reason(module, modules, hidden) or (NO_CALL if sampled else NOT_SAMPLED)
        rows.setdefault(("unseen", reason), []).append(name)
    return tuple(Coverage("attention", sight, tuple(places), reason) for (sight, reason), places in rows.items())


def module_coverage(
    family: str,
    modules: Sequence[str],
    seen: Collection[str],
    shadowed: Collection[str],
    refused: Mapping[str, str],
    compiled: Collection[str],
    *,
    sampled: bool,
) -> tuple[Coverage, ...]:
    """One row for the modules that were seen, and one for every reason why others were not.

    Args:
        family: Family of the signals that are measured there.
        modules: Names of the modules to look at.
        seen: Those that returned something that could be looked at.
        shadowed: Those that did so in a second pass over a part of the batch.
        refused: Reason by module where it could not.
        compiled: Those inside compiled parts.
        sampled: Whether a window has been open.
    """
    rows: dict[tuple[Sight, str], list[str]] = {}
    for name in modules:
        if name in seen:
            sight: tuple[Sight, str] = ("exact", "")
        elif name in shadowed:
            sight = ("bound", SHADOW)
        elif name in compiled:
            sight = ("unseen", COMPILED_MODULE)
        else:
            sight = ("unseen", refused.get(name, NOT_RETURNED if sampled else NOT_SAMPLED))
        rows.setdefault(sight, []).append(name)
    return tuple(Coverage(family, sight, tuple(places), reason) for (sight, reason), places in rows.items())


def output_coverage(
    heads: Mapping[str, bool],
    seen: Mapping[str, str],
    refused: Mapping[str, str],
    *,
    between: bool,
    sampled: bool,
) -> tuple[Coverage, ...]:
    """One row per sight and reason.

    Args:
        heads: Names of the modules whose outputs are the logits, and whether they are eager; empty where
            cross-entropy calls are looked at.
        seen: What is missing by call site, empty where nothing is.
        refused: Reason by call site where a call could not be looked at.
        between: Whether losses outside of modules are looked at.
        sampled: Whether a window has been open.
    """
    rows: dict[tuple[Sight, str], list[str]] = {}
    for site, missing in seen.items():
        rows.setdefault(("exact", missing), []).append(site)
    for site, reason in refused.items():
        rows.setdefault(("unseen", reason), []).append(site)
    for head, eager in heads.items():
        if head not in seen and head not in refused:
            reason = HEAD_COMPILED if not eager else NOT_CALLED if sampled else NOT_SAMPLED
            rows.setdefault(("unseen", reason), []).append(head)
    if not rows:
        reason = NOT_SAMPLED if not sampled else NO_LOSS if between else LOSS_BESIDE_COMPILED
        rows["unseen", reason] = []
    return tuple(Coverage("output", sight, tuple(places), reason) for (sight, reason), places in rows.items())


def _reason(module: nn.Module, modules: Mapping[str, nn.Module], hidden: Mapping[str, str]) -> str | None:
    for name, why in hidden.items():
        if name in modules and any(inner is module for inner in modules[name].modules()):
            return why
    return None
