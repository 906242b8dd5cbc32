"""A report is written when training ends, and what goes wrong with it is no matter of the run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from traindiag import Diagnostics, Settings


def train(folder: Path | None, steps: int = 12, **settings: bool) -> Diagnostics:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    diagnostics = Diagnostics(model, optimizer, log_dir=folder, settings=Settings(terminal=False, **settings))
    for _ in range(steps):
        with diagnostics.step() as step:
            step.loss(model(torch.randn(8, 4)).square().mean()).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    return diagnostics


def test_it_lies_beside_the_alerts(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"the report is .*report\.html"):
        train(tmp_path, report=True)
    page = (tmp_path / "traindiag" / "report.html").read_text("utf-8")
    assert "Gradient norm before and after clipping" in page


def test_none_is_written_unasked(tmp_path: Path) -> None:
    train(tmp_path)
    train(None, report=True)
    assert not list(tmp_path.rglob("report.html"))


def test_a_fault_in_it_is_told_and_the_run_has_ended_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.warns(RuntimeWarning, match=r'could not be made: .*pip install "traindiag\[report\]"'):
        diagnostics = train(tmp_path, report=True)
    assert diagnostics.step_count == 12


def test_a_run_is_plotted_from_memory() -> None:
    diagnostics = train(None)
    drawn = diagnostics.plot("loss/value")
    assert list(drawn.data[0].x) == list(range(12))
    assert drawn.data[0].y == pytest.approx(diagnostics.history["loss/value"].values[:, 0], rel=1e-5)
