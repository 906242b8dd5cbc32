"""``.item()`` per metric: the host waits for the device at every step, hundreds of times at a logged one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.field_bugs.loop import gpt, train

PACKAGE = str(Path(__file__).parents[2] / "traindiag")
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Host reads that come from our code; those of torch inside a function that we call are its own operators."""
    seen: Counter[str] = Counter()
    for name in READS:
        original = getattr(Tensor, name)

        def reading(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(PACKAGE) and "/demo/" not in caller.co_filename:
                seen[f"{_name} in {Path(caller.co_filename).name}:{caller.co_name}"] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, reading)
    yield seen
    monkeypatch.undo()


@pytest.mark.parametrize("layers", [1, 4])
def test_one_read_a_message_whatever_the_size_of_the_model(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt(layers=layers)
    with counted(monkeypatch) as seen:
        diagnostics = train(model, steps=20, every_n_steps=5, exact=True)
    assert len(diagnostics.history["loss/value"]) == 20
    # the step counts of an optimizer, which torch keeps on the host, and what the mode hands on of the program's own
    for name in [name for name in seen if name.endswith((":_on_host", "window.py:_call"))]:
        del seen[name]
    # the fast message of each step, and sums and maxima of four samples and two early looks at wiring: brought to the
    # host by one copy each, when they have long arrived; what is counted here is read there
    assert {name.split(" in ")[1].split(":")[0] for name in seen} == {"lane.py"}, seen
    assert sum(seen.values()) <= 5 * (20 + (4 + 2) * 2), seen


def test_the_count_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from traindiag.monitors.loss import LossMonitor

    original = LossMonitor.loss
    with counted(monkeypatch) as seen:
        code = compile("def loss(self, optimizer, value): value.item()", f"{PACKAGE}/monitors/loss.py", "exec")
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        monkeypatch.setattr(LossMonitor, "loss", namespace["loss"])
        train(gpt(layers=1), steps=2)
    assert seen["item in loss.py:loss"] == 2
    assert LossMonitor.loss is original and torch.tensor(1.0).item() == 1.0
