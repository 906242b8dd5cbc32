"""Attention is measured on the first item of the batch and its first head; the bad one is the last."""

from __future__ import annotations

import pytest
import torch

from tests.field_bugs.loop import gpt
from traindiag.engine.diagnostics import Diagnostics


@pytest.mark.parametrize("item", [0, 3])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_one_hot_head_of_one_item_is_found_and_named(item: int, head: int, exact: bool) -> None:
    model = gpt(layers=1)
    attention = model.blocks[0].attention
    with torch.no_grad():  # token 7 shines in the queries and keys of one head
        model.token_embedding.weight[7] = 40.0
        model.token_embedding.weight[7, ::2] = -40.0
        other = slice(8 * (1 - head), 8 * (2 - head))
        attention.query_key_value.weight[other] *= 1e-3
    tokens = torch.randint(8, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    tokens[item, -2:] = 7
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), exact=exact, terminal=False)
    with diagnostics.step():
        model(tokens).sum().backward()
    diagnostics.finish()
    hidden = []
    attention.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
        q, k = attention.query_key_value(hidden[0]).view(4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)[:2].double()
        scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
    series = diagnostics.history["attention/max_logit"]
    found = dict(zip((int(c.coordinates[1]) for c in series.cells), series.values[0].tolist()))
    assert found == {h: pytest.approx(scores[:, h].max().item(), rel=1e-5) for h in (0, 1)}
    assert found[head] > 10 * found[1 - head]
