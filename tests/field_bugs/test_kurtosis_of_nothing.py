"""A kurtosis divides by the variance without an epsilon: a layer that returns zeros is NaN, and an alarm."""

from __future__ import annotations

import torch

from tests.field_bugs.loop import gpt, train


def test_a_layer_of_zeros_has_none_and_is_no_fault() -> None:
    model = gpt()
    with torch.no_grad():
        for embedding in (model.token_embedding, model.position_embedding):
            embedding.weight.zero_()
    diagnostics = train(model, steps=1)
    assert (diagnostics.history["activation/rms"].values == 0).all()
    assert not diagnostics.history["activation/kurtosis"].seen.any()
    assert not [a for a in diagnostics.alerts if a.rule == "nonfinite"]
