"""An expert that no token has reached for some steps has a gradient of exactly zero (where gradients are not set to
None), and experts are numbered as layers are: both are taken for gradients that vanish.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field_bugs.loop import batch, gpt, loss_of
from tests.field_bugs.pack import told, warnings
from tests.rules.frames import frame, reading
from traindiag.engine.diagnostics import Diagnostics
from traindiag.record.cells import Cells

COUNT = 8


class Mixture(nn.Module):
    """Each token goes to its best expert."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, COUNT)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(COUNT)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = F.softmax(self.router(x), -1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            if mine.any():
                out = out.masked_scatter(mine[..., None], weight[mine][:, None] * expert(x[mine]))
        return out


def test_a_mixture_of_experts_is_left_alone() -> None:
    model = gpt()
    for block in model.blocks:
        block.mlp = Mixture(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    diagnostics = Diagnostics(model, optimizer, every_n_steps=1, max_overhead=None, terminal=False, strict=True)
    for step in range(40):
        with diagnostics.step() as s:
            s.loss(loss_of(model, batch(step))).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    diagnostics.finish()
    against = diagnostics.history["optimizer/grad_rms_over_eps"]
    resting = (against.values[2:] == 0) & (against.values[1:-1] == 0) & (against.values[:-2] == 0)
    assert resting.any()  # three samples in a row
    assert warnings(diagnostics.alerts) == []


PARAMETERS = Cells(
    ("optimizer", "parameter"), tuple(("adam", f"{kind}.{i}.weight") for kind in ("experts", "mlp") for i in range(4))
)


def test_most_of_them_resting_is_no_epsilon_but_a_dead_chain_is() -> None:
    def rules(values: list[float]) -> set[str]:
        signal = "optimizer/grad_rms_over_eps"
        frames = [frame(10 * i, reading([200.0] * 8 if i < 3 else values, signal, PARAMETERS)) for i in range(9)]
        return {rule for _, rule, _ in warnings(told(frames))}

    assert rules([200.0, 0.0, 0.0, 0.0, 200.0, 200.0, 200.0, 200.0]) == set()
    assert rules([200.0, 0.0, 0.0, 0.0, 200.0, 0.0, 0.0, 0.0]) == {"optimizer/epsilon"}  # the other joins its event
    assert rules([0.0] * 8) == {"optimizer/epsilon"}


def test_the_first_expert_is_no_first_layer() -> None:
    def rules(name: str) -> set[str]:
        cells = Cells(("optimizer", "block"), tuple(("adam", f"{name}.{i}") for i in range(3)))
        frames = [frame(i, reading([0.0, 1.0, 1.0], "gradient/block_norm", cells), lane="fast") for i in range(40)]
        return {rule for _, rule, _ in warnings(told(frames))}

    assert rules("moe.experts") == rules("q_heads") == set()
    assert rules("layers") == {"gradient/vanishing"}
