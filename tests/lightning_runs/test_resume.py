"""A killed and resumed run is one run: same batches, same alerts, nothing twice."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit, loader
from traindiag import Threshold, TrainingDiagnostics

STEPS, SAVED, KILLED = 24, 12, 15


class Kill(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == KILLED:
            raise KeyboardInterrupt  # Lightning ends the fit; what came after the checkpoint is lost


def diagnostics() -> TrainingDiagnostics:
    rules = [
        Threshold("loss/value", below=5.0, persistence=3, name="loss-low", severity="info"),
        Threshold("attention/max_logit", above=5.0, persistence=2, name="logit", severity="warning"),
        Threshold("loss/value", above=5.3, name="loss-high", severity="info"),
    ]
    return TrainingDiagnostics(rules=rules, every_n_steps=3, max_overhead=None, terminal=False)


def run(folder: Path, callbacks: list[Callback], ckpt_path: str | None = None) -> Trace:
    torch.manual_seed(0)
    trace = Trace()
    module = Automatic(DropoutGPT(qk_scale=3.0), trace, lr=1e-2)
    return fit(
        callbacks,
        module=module,
        trace=trace,
        steps=STEPS,
        ckpt_path=ckpt_path,
        folder=folder,
        validation=False,
        enable_checkpointing=True,
        logger=None,
        use_distributed_sampler=False,
    )


def comparable(alerts: list[Any]) -> list[tuple[Any, ...]]:
    """Values up to the checkpoint only: a plain loader begins anew in a resumed job and gives other batches."""
    return [(a.rule, a.status, a.step, a.where, a.value if a.step < SAVED else None, a.severity) for a in alerts]


def test_resumed_run_gives_the_alerts_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = diagnostics()
    run(tmp_path / "unbroken", [unbroken])
    assert len({a.rule for a in unbroken.alerts}) >= 2  # there is something to lose

    first = diagnostics()
    save = ModelCheckpoint(dirpath=tmp_path, filename="at-{step}", every_n_train_steps=SAVED, save_top_k=-1)
    with contextlib.suppress(SystemExit):
        run(tmp_path / "broken", [first, save, Kill()])
    second = diagnostics()
    run(tmp_path / "broken", [second], ckpt_path=str(tmp_path / f"at-step={SAVED}.ckpt"))

    told = {(a.id, a.status): a for a in first.alerts + second.alerts}
    assert comparable(sorted(told.values(), key=lambda a: a.step)) == comparable(unbroken.alerts)
    assert {a.run for a in told.values()} == {first.alerts[0].run}  # one run id over both jobs


def test_checkpoint_is_plain_data(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=SAVED)
    run(tmp_path, [diagnostics(), save])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = next(s for key, s in checkpoint["callbacks"].items() if "TrainingDiagnostics" in key)
    assert state["step"] == SAVED * (STEPS // SAVED)
    json.dumps(state)  # nothing but numbers, strings, lists and dicts


def test_old_checkpoint_without_our_state_resumes(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="at-{step}", every_n_train_steps=SAVED, save_top_k=-1)
    run(tmp_path, [save])
    late = diagnostics()
    run(tmp_path, [late], ckpt_path=str(tmp_path / f"at-step={SAVED}.ckpt"))
    assert late.history["loss/value"].steps[0] == 0


class StatefulLoader:
    """A loader that resumes where it stopped, the kind that a careless read of the trainer restarts."""

    def __init__(self) -> None:
        self.batches = list(loader(STEPS))
        self.position = 0

    def __iter__(self) -> Any:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_stateful_loader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def batches(callbacks: list[Callback], ckpt_path: str | None = None) -> list[str]:
        import warnings

        from lightning.pytorch import Trainer

        torch.manual_seed(0)
        trace = Trace()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                callbacks=callbacks,
                enable_progress_bar=False,
                enable_model_summary=False,
                logger=False,
                default_root_dir=tmp_path,
            )
            with contextlib.suppress(SystemExit):
                trainer.fit(Automatic(DropoutGPT(), trace), StatefulLoader(), ckpt_path=ckpt_path)
        return trace.batches

    def broken(with_diagnostics: bool) -> tuple[list[str], list[str]]:
        folder = tmp_path / str(with_diagnostics)
        extra = [TrainingDiagnostics(terminal=False)] if with_diagnostics else []
        save = ModelCheckpoint(dirpath=folder, filename="at", every_n_train_steps=SAVED, save_top_k=-1)
        before = batches([*extra, save, Kill()])
        extra = [TrainingDiagnostics(terminal=False)] if with_diagnostics else []
        return before, batches(extra, str(folder / "at.ckpt"))

    without, with_it = broken(False), broken(True)
    assert without == with_it
    assert len(without[1]) == STEPS - SAVED  # the loader did resume
