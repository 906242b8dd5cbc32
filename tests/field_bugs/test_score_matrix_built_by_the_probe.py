"""The probe multiplies all queries with all keys: the T x T matrix that the fused kernel had avoided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.field_bugs.loop import batch, gpt, loss_of
from traindiag.engine.diagnostics import Diagnostics
from traindiag.functional import attention

LENGTH = 768


class Largest(TorchDispatchMode):
    """Size of the largest tensor that is made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def largest(exact: bool, watched: bool) -> int:
    model = gpt(layers=1, context=LENGTH, vocabulary=256)
    model.head = torch.nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Largest() as seen:
        if not watched:
            loss_of(model, batch(0, 1, LENGTH) % 4).backward()
        else:
            diagnostics = Diagnostics(model, optimizer, exact=exact, terminal=False)
            with diagnostics.step() as step:
                step.loss(loss_of(model, batch(0, 1, LENGTH) % 4)).backward()
                optimizer.step()
            diagnostics.finish()
            assert diagnostics.history["attention/max_logit"].seen.all()
    return seen.numel


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_as_large_as_the_scores_is_made(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 2**17)  # so that a short sequence has several blocks
    without = largest(exact, watched=False)
    assert without < LENGTH * LENGTH  # the kernel itself does not make them
    assert largest(exact, watched=True) < LENGTH * LENGTH
