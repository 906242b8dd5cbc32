"""The batch that did it is named: in the alert, in its bundle, after a resume and in a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import traindiag
from traindiag.engine.batches import LONGEST, name_batch
from traindiag.engine.diagnostics import Diagnostics

BAD = 45


def train(folder: Path | None, steps: range, resume: Any = None, **settings: Any) -> Diagnostics:
    """A classifier of two blobs; in one step the inputs are a thousand times too large and the labels wrong."""
    torch.manual_seed(0)
    model, source = nn.Linear(4, 2), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    diagnostics = Diagnostics(model, optimizer, folder, terminal=False, max_overhead=None, **settings)
    diagnostics.load_state_dict(resume or {})
    for i in range(steps.stop):
        labels = torch.randint(2, (16,), generator=source)
        inputs = torch.randn(16, 4, generator=source) + 3 * (2 * labels[:, None] - 1)
        batch = {"x": inputs, "y": labels, "id": 100 * i + torch.arange(16)}
        if i == BAD:
            batch |= {"x": -1000 * inputs}
        if i not in steps:
            continue
        with diagnostics.step() as step:
            step.batch(batch, f"epoch 0, batch {i}")
            step.loss(nn.functional.cross_entropy(model(batch["x"]), batch["y"])).backward()
            step.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return diagnostics


def ids(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["id"][:3].tolist()


def the_alert(alerts: Any) -> Any:
    found = [a for a in alerts if a.diagnosis == "corrupt batch" and a.status != "closed"]
    assert len(found) == 1, [(a.rule, a.diagnosis, a.step) for a in alerts]
    return found[0]


def test_ids_stand_in_the_advice_and_in_the_bundle(tmp_path: Path) -> None:
    diagnostics = train(tmp_path, range(60), batch_id=ids)
    diagnostics.finish()
    alert = the_alert(diagnostics.alerts)
    assert f"step {BAD} (epoch 0, batch 45: [4500, 4501, 4502])" in alert.remedies[0].text
    assert alert.bundle["batches"][str(BAD)] == ["epoch 0, batch 45: [4500, 4501, 4502]"]
    assert len(alert.bundle["batches"]) == 8
    replayed = the_alert(traindiag.replay(tmp_path).alerts)
    assert replayed.to_dict() == alert.to_dict()


def test_a_resumed_job_knows_the_batches_before_it() -> None:
    first = train(None, range(BAD), batch_id=ids)
    state = first.state_dict()
    second = train(None, range(BAD, 60), state, batch_id=ids)
    second.finish()
    assert str(BAD - 1) in the_alert(second.alerts).bundle["batches"]


def test_without_ids_the_place_is_told() -> None:
    diagnostics = train(None, range(60))
    diagnostics.finish()
    assert f"step {BAD} (epoch 0, batch 45):" in the_alert(diagnostics.alerts).remedies[0].text


def test_a_function_that_raises_is_asked_once_and_training_goes_on() -> None:
    asked = []

    def broken(batch: object) -> object:
        asked.append(batch)
        raise KeyError("id")

    with pytest.warns(RuntimeWarning, match="batch_id failed and is not asked again: KeyError"):
        diagnostics = train(None, range(60), batch_id=broken)
    diagnostics.finish()
    assert len(asked) == 1 and the_alert(diagnostics.alerts)


def test_bad_arguments_and_long_ids() -> None:
    with pytest.raises(TypeError, match=r"batch_id must be a function .* got 'id'"):
        traindiag.Settings(batch_id="id")  # type: ignore[arg-type]
    label = name_batch(range(1000), "here", list, pytest.fail)
    assert len(label) == LONGEST and label.startswith("here: [0, 1, ") and label.endswith("\N{HORIZONTAL ELLIPSIS}")
