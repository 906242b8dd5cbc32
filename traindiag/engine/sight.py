"""What is seen of a run, family by family, once the first sample is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traindiag.capture.watched import Watched
from traindiag.record.coverage import Coverage
from traindiag.record.series import History


def coverage_of(
    attention: Sequence[Coverage] | None, others: Sequence[Coverage], watched: Watched, history: History
) -> tuple[Coverage, ...]:
    """Rows for every family.

    Args:
        attention: What the capture window saw of attention; None where no monitor looks at it.
        others: What it saw of output logits and of the modules whose outputs some monitor looks at.
        watched: What is trained.
        history: What has been recorded so far.
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
        reason = "seen when the optimizer is called, after any clipping"
        return [Coverage("gradient", "exact", tuple(watched.optimizers), reason)]
    return [Coverage("gradient", "unseen", tuple(watched.optimizers), "no optimizer has stepped with a gradient")]
