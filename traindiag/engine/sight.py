"""What is seen of a run, family by family, once the first sample is in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from traindiag.capture.optimizer_state import unseen_second_moments
from traindiag.capture.parameter_sample import ParameterSample
from traindiag.capture.watched import Watched
from traindiag.record.coverage import Coverage
from traindiag.record.series import History
from traindiag.transfer.ranks import world_size


def coverage_of(
    attention: Sequence[Coverage] | None,
    others: Sequence[Coverage],
    watched: Watched,
    history: History,
    families: Collection[str],
) -> tuple[Coverage, ...]:
    """Rows for every family.

    Args:
        attention: What the capture window saw of attention; None where no monitor looks at it.
        others: What it saw of output logits and of the modules whose outputs some monitor looks at.
        watched: What is trained.
        history: What has been recorded so far.
        families: Families that some monitor looks at.
    """
    rows: list[Coverage] = []
    if attention is not None:
        reason = "this model has no attention that could be recognised"
        rows += attention or [Coverage("attention", "unseen", (), reason)]
    rows += others
    rows += _gradients(watched, history)
    rows.append(
        Coverage("loss", "exact", tuple(str(c) for c in history["loss/value"].cells))
        if "loss/value" in history
        else Coverage("loss", "unseen", (), "no loss was handed over")
    )
    if "optimizer" in families:
        rows += _optimizers(watched, history)
    if "wiring" in families:
        rows += _wiring(watched, history)
    return tuple(rows)


def _gradients(watched: Watched, history: History) -> list[Coverage]:
    if "gradient/norm" in history:
        series = history["gradient/parameter_norm"]
        names = [str(c.coordinates[1]) for c in series.cells]
        seen = tuple(names[i] for i in np.flatnonzero(series.seen.any(axis=0)))
        missing = tuple(name for name in names if name not in set(seen))
        rows = [Coverage("gradient", "exact", seen)]
        return [*rows, Coverage("gradient", "unseen", missing, "no gradient so far")] if missing else rows
    if "gradient/norm_applied" in history:
        series = history["gradient/norm_applied"]
        seen = tuple(series.cells.labels[i] for i in np.flatnonzero(series.seen.any(axis=0)))
        missing = tuple(name for name in watched.optimizers if name not in seen)
        rows = [Coverage("gradient", "exact", seen, "seen when the optimizer is called, after any clipping")]
        return [*rows, Coverage("gradient", "unseen", missing, "no gradient so far")] if missing else rows
    return [Coverage("gradient", "unseen", tuple(watched.optimizers), "no optimizer has stepped with a gradient")]


def _optimizers(watched: Watched, history: History) -> list[Coverage]:
    """What is seen of updates; second moments, which not every optimizer has, are told apart."""
    if "optimizer/update_rms" not in history:
        return [Coverage("optimizer", "unseen", tuple(watched.optimizers), "no optimizer has stepped in a sample")]
    stepped = tuple(dict.fromkeys(str(c.coordinates[0]) for c in history["optimizer/update_rms"].cells))
    rows = [Coverage("optimizer", "exact", stepped)]
    if rested := tuple(name for name in watched.optimizers if name not in stepped):
        rows.append(Coverage("optimizer", "unseen", rested, "it has not stepped in a sample"))
    for name, parameters in watched.parameters.items():
        if name in rested:
            continue
        sample = ParameterSample(name, parameters)
        for reason, without in unseen_second_moments(watched.optimizers[name], sample).items():
            places = [name] if len(without) == len(sample.parameters) else without
            rows.append(Coverage("optimizer", "unseen", tuple(places), f"rms_t and grad_rms_over_eps: {reason}"))
        known = {str(place) for _, place in sample.cells.coordinates}
        if hidden := tuple(n for n, _ in parameters if n not in known):
            rows.append(Coverage("optimizer", "unseen", hidden, "sparse, quantised or without values yet"))
    return rows


def _wiring(watched: Watched, history: History) -> list[Coverage]:
    """The checks that have been made, and why others cannot be."""
    made = tuple(name for name in history if name.startswith("wiring/"))
    rows = [Coverage("wiring", "exact", made)] if made else []
    if "wiring/ungraded" not in history:
        reason = "no optimizer has stepped in a sample and shown its gradients"
        rows.append(Coverage("wiring", "unseen", ("wiring/ungraded", "wiring/unchanged"), reason))
    if "wiring/owners" not in history:
        rows.append(
            Coverage("wiring", "unseen", ("wiring/owners",), "no optimizer owns a tensor of the model itself")
        )
    if world_size() > 1 and "wiring/replicas_differ" not in history:
        reason = "every tensor is sharded: ranks hold different parts"
        rows.append(Coverage("wiring", "unseen", ("wiring/replicas_differ",), reason))
    return rows
