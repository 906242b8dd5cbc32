"""Bad input gets a clear message, early where it can be early, and never ends a run that could go on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from tests.lightning_runs.run import fit
from traindiag import Diagnostics, Forecast, Threshold, TrainingDiagnostics
from traindiag.demo.model import GPT, GPTConfig, next_token_loss


def test_unknown_signal_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no signal 'attention/max_logits'.*'attention/max_logit'"):
        Threshold("attention/max_logits", above=1.0)
    with pytest.raises(ValueError, match=r"no signal 'gradeint/norm'.*'gradient/norm'"):
        Forecast("gradeint/norm", limit=1.0)


def test_rule_without_a_limit() -> None:
    with pytest.raises(ValueError, match="above"):
        Threshold("attention/max_logit")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"max_overhead": 2.0}, "max_overhead must be a share between 0 and 1, or None; got 2.0"),
        ({"rules": ["attention/max_logit > 5"]}, "rules must hold Rule objects"),
        ({"monitors": [nn.Linear(1, 1)]}, "monitors must hold Monitor objects"),
        ({"actions": [None]}, "actions must be functions"),
        ({"exclude": ["atention"]}, "'atention'.*Did you mean 'attention'"),
        ({"exclude": "attention"}, "exclude is a list"),
        ({"watch": ""}, "watch must name"),
        (
            {"rules": [Threshold("loss/value", above=1.0, name="a"), Threshold("loss/value", above=2.0, name="a")]},
            "two rules are called 'a'",
        ),
    ],
)
def test_wrong_argument_is_refused_at_construction(argument: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainingDiagnostics(**argument)


def test_unknown_module_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"watch='model.net.block.1'.*'model.net.blocks.1'"):
        fit([TrainingDiagnostics(watch="model.net.block.1", terminal=False)])


def test_watch_narrows_attention_and_leaves_the_rest() -> None:
    diagnostics = TrainingDiagnostics(watch="model.net.blocks.1*", terminal=False)
    fit([diagnostics])
    cells = diagnostics.history["attention/max_logit"].cells
    assert {c.coordinates[0] for c in cells} == {"model.net.blocks.1.attention"}


def test_model_without_attention_is_told_once_and_watched(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every_n_steps=2)
    for _ in range(7):
        with diagnostics.step() as step:
            step.loss(model(torch.ones(2, 4)).square().mean()).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    assert capsys.readouterr().err.count("no attention that could be recognised") == 1
    assert len(diagnostics.history["gradient/norm"]) == 7


def test_loss_that_is_no_scalar_is_refused_once() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, terminal=False)
    with pytest.warns(RuntimeWarning, match=r"got a tensor of shape \(2, 1\)") as told:
        for _ in range(3):
            with diagnostics.step() as step:
                step.loss(model(torch.ones(2, 4))).sum().backward()
                optimizer.step()
        diagnostics.finish()
    assert len(told) == 1
    assert "loss/value" not in diagnostics.history
    assert len(diagnostics.history["gradient/norm_applied"]) == 3


def test_empty_batch_is_no_fault_of_ours() -> None:
    model = GPT(GPTConfig(layers=1, width=16, heads=2, context=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every_n_steps=1, strict=True, terminal=False)
    for batch in (2, 0, 2):
        with diagnostics.step() as step:
            tokens = torch.zeros(batch, 8, dtype=torch.long)
            loss = next_token_loss(model(tokens), tokens)[0] if batch else model(tokens).sum()
            step.loss(loss).backward()
            step.gradients()
            optimizer.step()
    diagnostics.finish()
    seen = diagnostics.history["attention/max_logit"].seen
    assert seen[0].all() and seen[-1].all()
    assert not any(a.severity != "info" for a in diagnostics.alerts)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger, None])
def test_folder_that_cannot_be_written_is_told_and_training_goes_on(
    logger: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if logger is None:
        blocked = tmp_path / "a file"
        blocked.write_text("in the way")
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rules = [Threshold("loss/value", above=-1.0, name="always")]
        diagnostics = Diagnostics(model, optimizer, blocked / "logs", rules=rules, terminal=False)
        with pytest.warns(RuntimeWarning) as told:
            for _ in range(12):
                with diagnostics.step() as step:
                    step.loss(model(torch.ones(2, 4)).square().mean()).backward()
                    optimizer.step()
            diagnostics.finish()
        texts = [str(w.message) for w in told if "traindiag" in str(w.message)]
        assert sum("panels stopped" in t for t in texts) == 1
        assert sum("alerts are not written" in t for t in texts) == 1
        assert len(diagnostics.history["loss/value"]) == 12
        return
    # their own logger works; our alert file is blocked by a file of the same name
    lightning_logger = logger(tmp_path, name="run", version=0)
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    (tmp_path / "run" / "version_0" / "traindiag").write_text("in the way")
    diagnostics_ = TrainingDiagnostics(rules=[Threshold("loss/value", above=-1.0, name="always")], terminal=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([diagnostics_], logger=lightning_logger, folder=tmp_path)
    assert len(diagnostics_.history["loss/value"]) == 6


def test_numbers_of_your_own_with_a_bad_name_or_value() -> None:
    model = nn.Linear(4, 1)
    diagnostics = Diagnostics(model, torch.optim.SGD(model.parameters(), lr=0.1), terminal=False)
    for name, value, message in [
        ("kl", 1.0, "family/metric"),
        ("loss/value", 1.0, "built-in"),
        ("reward/kl", torch.ones(2), r"shape \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            diagnostics.log(name, value)
    diagnostics.finish()
