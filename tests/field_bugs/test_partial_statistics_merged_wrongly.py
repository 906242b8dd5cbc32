"""Means of unequal parts are averaged, or variances merged with the wrong sign: parts do not give the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.ranks import run_on_ranks
from traindiag.engine.diagnostics import Diagnostics

SIGNALS = ("query_norm", "key_norm", "entropy", "max_logit")
held_by = torch.tensor([0] * 1 + [1] * 5)  # which rank, or micro-batch, has which item: parts of unequal size


def measured(parts: list[torch.Tensor]) -> dict[str, Any]:
    model = gpt()
    diagnostics = Diagnostics(
        model, torch.optim.SGD(model.parameters(), lr=0.1), exact=True, default_rules=False, terminal=False
    )
    with diagnostics.step():
        for part in parts:
            loss_of(model, part).backward()
    diagnostics.finish()
    return {name: diagnostics.history[f"attention/{name}"].values[0] for name in SIGNALS}


def tokens() -> torch.Tensor:
    tokens = batch(0, size=len(held_by))
    tokens[0] = 3  # an item unlike the others, so that the means of the parts differ
    return tokens


def _on_rank(rank: int) -> dict[str, Any]:
    return measured([tokens()[held_by == rank]])


def test_parts_of_unequal_size_give_the_whole() -> None:
    whole = measured([tokens()])
    in_parts = measured([tokens()[held_by == i] for i in (0, 1)])
    on_ranks, other = run_on_ranks(_on_rank)
    first, second = measured([tokens()[held_by == 0]]), measured([tokens()[held_by == 1]])
    for name in SIGNALS:
        np.testing.assert_array_equal(on_ranks[name], other[name])
        np.testing.assert_allclose(in_parts[name], whole[name], rtol=1e-5)
        np.testing.assert_allclose(on_ranks[name], whole[name], rtol=1e-5)
        if name != "max_logit":  # the mean of the means would be something else
            assert not np.allclose((first[name] + second[name]) / 2, whole[name], rtol=1e-3)
