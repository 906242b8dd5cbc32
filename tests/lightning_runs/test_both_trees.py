"""`lightning.pytorch` and `pytorch_lightning`: the same hooks, a class for each, both from code and from YAML."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import traindiag
from tests.lightning_runs.run import DropoutGPT, loader
from traindiag.demo.model import next_token_loss
from traindiag.record.log import read_log

TREES = {"lightning.pytorch": "traindiag.lightning", "pytorch_lightning": "traindiag.pytorch_lightning"}


class Text:
    """What both trees' modules have in common."""

    def __init__(self, qk_scale: float = 1.0) -> None:
        super().__init__()
        self.model = DropoutGPT(dropout=0.1, qk_scale=qk_scale)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = next_token_loss(self.model(inputs), targets)[0]
        self.losses.append(loss.detach().clone())
        self.log("train/loss", loss)
        return loss

    def train_dataloader(self) -> Any:
        return loader(6)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


NETS = {tree: type("Net", (Text, import_module(tree).LightningModule), {"__module__": __name__}) for tree in TREES}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options(folder: Path) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return {"accelerator": "cpu", "devices": 1, "max_steps": 6, "default_root_dir": str(folder), **quiet}


def fit(tree: str, folder: Path, callbacks: list[Any], *, qk_scale: float = 1.0, logger: Any = False) -> Any:
    torch.manual_seed(0)
    net = NETS[tree](qk_scale)
    trainer = import_module(tree).Trainer(callbacks=callbacks, logger=logger, **options(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net)
    return trainer


def test_each_trainer_takes_its_own_and_is_warned(tree: str, tmp_path: Path) -> None:
    kind = import_module(TREES[tree]).TrainingDiagnostics
    assert issubclass(kind, import_module(tree).Callback)
    diagnostics = kind(every_n_steps=2, terminal=False, strict=True)
    with_it = fit(tree, tmp_path, [diagnostics], qk_scale=40.0).lightning_module
    assert any(a.family == "attention" for a in diagnostics.alerts)
    without = fit(tree, tmp_path, [], qk_scale=40.0).lightning_module
    assert all(a.equal(b) for a, b in zip(with_it.losses, without.losses, strict=True))
    assert all(a.equal(b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))


def test_loggers_of_each_tree_are_known(tree: str, tmp_path: Path) -> None:
    class Renamed(import_module(f"{tree}.loggers").TensorBoardLogger):  # type: ignore[misc]
        """A user's own, which is still one."""

    diagnostics = import_module(TREES[tree]).TrainingDiagnostics(terminal=False)
    fit(tree, tmp_path, [diagnostics], logger=Renamed(tmp_path))
    assert len(list(tmp_path.rglob("events*"))) == 1  # theirs, and none of ours beside it
    assert "gradient/norm" in read_log(tmp_path).history


def test_a_checkpoint_holds_the_state_of_each(tree: str, tmp_path: Path) -> None:
    kind = import_module(TREES[tree]).TrainingDiagnostics
    fit(tree, tmp_path, [kind(terminal=False)]).save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert states["TrainingDiagnostics"]["step"] == 6


def cli(tree: str, folder: Path, callback: dict[str, Any]) -> Any:
    config = folder / "config.yaml"
    trainer = {**options(folder), "logger": False, "callbacks": [callback]}
    config.write_text(yaml.safe_dump({"model": {"qk_scale": 40.0}, "trainer": trainer}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"{tree}.cli").LightningCLI(
            NETS[tree], args=["fit", "--config", str(config)], save_config_callback=None
        )


def class_path(tree: str) -> str:
    return "traindiag.TrainingDiagnostics" if tree == "lightning.pytorch" else f"{TREES[tree]}.TrainingDiagnostics"


def test_command_line_builds_it_from_yaml_and_fits(tree: str, tmp_path: Path) -> None:
    rules = [
        {"class_path": "traindiag.Threshold", "init_args": {"signal": "loss/value", "above": 0.1, "name": "mine"}},
        {"class_path": "traindiag.NonFinite", "init_args": {"name": "mine too"}},
    ]
    arguments = {"rules": rules, "every_n_steps": 2, "max_overhead": None, "terminal": False}
    done = cli(tree, tmp_path, {"class_path": class_path(tree), "init_args": arguments})
    (diagnostics,) = (c for c in done.trainer.callbacks if type(c).__name__ == "TrainingDiagnostics")
    assert diagnostics.history["attention/max_logit"].steps[:2].tolist() == [0, 2]
    assert {"mine"} < {a.rule for a in diagnostics.alerts}


def test_command_line_builds_actions(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "http://127.0.0.1:9/secret")
    actions = [
        {"class_path": "traindiag.StopTraining", "init_args": {"severity": "critical"}},
        {"class_path": "traindiag.SaveCheckpoint", "init_args": {"status": ["opened"]}},
        {"class_path": "traindiag.Webhook", "init_args": {"env": "HOOK", "attempts": 1, "diagnosis": "nothing"}},
    ]
    rule = {"class_path": "traindiag.Threshold", "init_args": {"signal": "loss/value", "above": 0.1, "name": "mine"}}
    arguments = {
        "rules": [rule], "actions": actions, "terminal": False, "severity": {"gradient/norm-spike": "info"},
        "silence": {"nonfinite": "a reason"},
    }  # fmt: skip
    done = cli(tree, tmp_path, {"class_path": class_path(tree), "init_args": arguments})
    (diagnostics,) = (c for c in done.trainer.callbacks if type(c).__name__ == "TrainingDiagnostics")
    assert list(map(repr, diagnostics._settings.actions)) == [
        "StopTraining(severity='critical')", "SaveCheckpoint(status=('opened',))",
        "Webhook(env='HOOK', diagnosis='nothing')",
    ]  # fmt: skip
    assert diagnostics._settings.silence == {"nonfinite": "a reason"}
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["step-1-mine-opened.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_step": 2}, "every_n_step"),
        ({"every_n_steps": "often"}, "often"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"rules": [{"class_path": "traindiag.Threshold", "init_args": {"signal": "loss/valve"}}]}, "loss/valve"),
    ],
    ids=["unknown", "type", "value", "nested"],
)
def test_command_line_refuses_a_bad_argument(
    tree: str, arguments: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        cli(tree, tmp_path, {"class_path": class_path(tree), "init_args": arguments})
    assert message in capsys.readouterr().err + str(refused.value)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The package as if nobody had asked it for the callback yet."""
    vars(traindiag).pop("TrainingDiagnostics", None)
    for module in TREES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    return monkeypatch


def test_public_name_is_that_of_the_tree_that_is_installed(fresh: pytest.MonkeyPatch) -> None:
    both = traindiag.TrainingDiagnostics
    assert both.__module__ == "traindiag.lightning"
    del traindiag.TrainingDiagnostics
    fresh.delitem(sys.modules, "traindiag.lightning")
    for module in ("lightning", "lightning.pytorch"):  # as if it were not installed
        fresh.setitem(sys.modules, module, None)
    alone = traindiag.TrainingDiagnostics
    assert alone is import_module("traindiag.pytorch_lightning").TrainingDiagnostics
    del traindiag.TrainingDiagnostics


def test_without_any_lightning_the_error_says_what_to_install(fresh: pytest.MonkeyPatch) -> None:
    for tree in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        fresh.setitem(sys.modules, tree, None)
    with pytest.raises(ImportError, match=r"pip install lightning.*traindiag\.Diagnostics"):
        traindiag.TrainingDiagnostics  # noqa: B018
