"""Logs that are not ours: at the steps and with the values of a live run, as far as they can be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from traindiag import TrainingDiagnostics, replay
from traindiag.playback.foreign import Unreadable
from traindiag.playback.names import name_signals
from traindiag.playback.replay import ReplayedRun

NORMS = [*([1.0, 1.1, 0.9, 1.0] * 10), 20.0, 1.0]  # a jump at the 41st


def only(path: Path, **keywords: object) -> ReplayedRun:
    (run,) = replay(path, **keywords).runs  # type: ignore[arg-type]
    return run


def series(run: ReplayedRun, signal: str) -> dict[int, float]:
    found = run.history[signal]
    return dict(zip(found.steps.tolist(), found.values[:, 0].tolist()))


def jumps(run: ReplayedRun) -> list[int]:
    return [a.step for a in run.alerts if a.rule == "gradient/norm-spike" and a.status == "opened"]


def taken(run: ReplayedRun) -> dict[str, tuple[str, str]]:
    return {n.foreign: (n.signal, n.why) for n in run.names}


def write_csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


class TrueNorm(Automatic):
    """Logs what people log."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("grad_norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())
        self.log("lr", optimizer.param_groups[0]["lr"])


def test_lightnings_csv_is_read_at_the_steps_of_the_live_run(tmp_path: Path) -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    logger = CSVLogger(tmp_path, name="", version=0)
    trace = Trace()
    module = TrueNorm(DropoutGPT(), trace)
    fit([diagnostics], module=module, trace=trace, steps=8, logger=logger, log_every_n_steps=1, folder=tmp_path)
    run = only(tmp_path / "version_0" / "metrics.csv")
    live = diagnostics.history
    for signal in ("loss/value", "gradient/norm"):
        assert list(series(run, signal)) == live[signal].steps.tolist() == list(range(8))
        assert list(series(run, signal).values()) == pytest.approx(live[signal].values[:, 0].tolist(), rel=1e-5)
    assert taken(run)["train/loss"] == ("loss/value", "guessed")
    assert taken(run)["val/loss"] == ("logged/val/loss", "unknown")
    assert taken(run)["lr"] == ("learning_rate", "guessed")


def test_the_trainers_state_is_read_at_the_steps_of_the_live_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.hf_runs.run import llama, train
    from traindiag import HFTrainingDiagnostics

    diagnostics = HFTrainingDiagnostics(terminal=False)
    train(llama(), [diagnostics], tmp_path / "run", steps=6, save_strategy="steps", save_steps=6)
    (state,) = tmp_path.rglob("trainer_state.json")
    run, live = only(state), diagnostics.history
    for signal in ("loss/value", "gradient/norm"):
        assert list(series(run, signal)) == live[signal].steps.tolist() == list(range(6))
        assert list(series(run, signal).values()) == pytest.approx(live[signal].values[:, 0].tolist(), rel=1e-3)
    assert run.run.length == 6
    assert any("counts from 1" in note for note in run.notes)


def test_the_trainers_steps_are_known_in_its_other_logs(tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path / "runs"))
    for step in (1, 2, 3):
        values = [Summary.Value(tag=f"train/{n}", simple_value=1.0) for n in ("loss", "grad_norm", "epoch")]
        writer.add_event(Event(step=step, wall_time=1.0, summary=Summary(value=values)))
    writer.close()
    exported = write_csv(tmp_path / "wandb.csv", "_step,train/global_step,train/loss", ["7,1,1.0", "8,2,1.0"])
    for path, steps in ((tmp_path / "runs", [0, 1, 2]), (exported, [0, 1])):
        run = only(path)
        assert list(series(run, "loss/value")) == steps
        assert any("counts from 1" in note for note in run.notes)


def test_a_folder_of_the_trainer_gives_its_longest_state_once(tmp_path: Path) -> None:
    for steps in (10, 30, 20):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        rows = [{"step": s + 1, "epoch": 0.1, "loss": 2.0, "grad_norm": 1.0} for s in range(steps)]
        rows.append({"step": steps, "train_loss": 9.0, "train_runtime": 1.0})
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows, "max_steps": 100}))
    run = only(tmp_path)
    assert list(series(run, "loss/value")) == list(range(30))
    assert "train_loss" not in taken(run)  # the last row sums up and is no step


def test_a_state_that_is_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    rows = [{"step": s + 1, "grad_norm": n} for s, n in enumerate(NORMS)]
    text = json.dumps({"best_metric": None, "log_history": rows, "max_steps": 100})
    file = tmp_path / "trainer_state.json"
    file.write_text(text[: text.index('"step": 42')])
    run = only(file)
    assert jumps(run) == [40]
    assert any("as far as it goes" in note for note in run.notes)


def test_tensorboard_scalars_of_old_and_new_kind(tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path / "run"))
    for step, norm in enumerate(NORMS):
        meta = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
        content = np.float32(norm / 2).tobytes()
        values = [
            Summary.Value(tag="grad-norm/grad-norm", simple_value=norm),
            Summary.Value(
                tag="lm-loss-training/lm loss", tensor=TensorProto(dtype=1, float_val=[norm]), metadata=meta
            ),
            Summary.Value(tag="reward", tensor=TensorProto(dtype=1, tensor_content=content), metadata=meta),
            Summary.Value(tag="words", tensor=TensorProto(dtype=7, string_val=[b"x"])),
        ]
        writer.add_event(Event(step=step, wall_time=1.0, summary=Summary(value=values)))
    writer.close()
    run = only(tmp_path)
    assert jumps(run) == [40]
    assert series(run, "logged/reward")[40] == 10.0
    assert taken(run) == {
        "grad-norm/grad-norm": ("gradient/norm", "guessed"),
        "lm-loss-training/lm loss": ("loss/value", "guessed"),
        "reward": ("logged/reward", "unknown"),
    }
    (file,) = (tmp_path / "run").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    cut = only(tmp_path)
    assert cut.steps == len(NORMS) - 1 and any("incomplete" in note for note in cut.notes)
    file.write_bytes(whole[:2000] + b"\xff" * 9 + whole[2009:])
    assert any("damaged" in note for note in only(tmp_path).notes)


def test_folders_are_runs_and_files_of_one_folder_are_one(tmp_path: Path) -> None:
    for folder, start, scale in (("a", 0, 1.0), ("b", 0, 2.0), ("a", 20, 3.0)):
        writer = EventFileWriter(str(tmp_path / folder), filename_suffix=f".{start}")
        for step in range(start, 40):
            summary = Summary(value=[Summary.Value(tag="loss", simple_value=scale)])
            writer.add_event(Event(step=step, wall_time=1.0, summary=summary))
        writer.close()
    a, b = replay(tmp_path).runs
    assert list(series(a, "loss/value").values()) == 20 * [1.0] + 20 * [3.0]  # resumed at 20
    assert len(series(b, "loss/value")) == 40
    assert (a.run.run_id, b.run.run_id) == ("a", "b")


def test_csv_with_gaps_repeats_and_rubbish(tmp_path: Path) -> None:
    rows = [f"{s},{n},,text" for s, n in enumerate(NORMS)]
    rows += ["38,1.0,,", "39,1.0,,", "40,1.0,nan,"]  # resumed at 38: the jump never was
    rows += ["x,1,1,1", "", "41.0,1.0,2.5,"]
    run = only(write_csv(tmp_path / "m.csv", "Step,grad_norm,train_loss,note", rows))
    assert jumps(run) == []
    (alert,) = [a for a in run.alerts if a.status == "opened"]
    assert (alert.rule, alert.step, alert.signal) == ("nonfinite", 40, "loss/value")  # an empty field is no NaN
    assert sorted(series(run, "loss/value")) == [40, 41]
    assert any("1 row without a step" in note for note in run.notes)


def test_a_resumed_run_takes_back_what_lies_behind_its_beginning(tmp_path: Path) -> None:
    rows = [f"{s},{n}" for s, n in enumerate(NORMS)] + ["37,1.5"]
    run = only(write_csv(tmp_path / "m.csv", "step,grad_norm", rows))
    assert jumps(run) == [] and list(series(run, "gradient/norm"))[-2:] == [36, 37]


def test_json_lines_with_groups_and_a_torn_end(tmp_path: Path) -> None:
    lines = [json.dumps({"global_step": s, "train": {"grad_norm": n}, "lr": 1e-3}) for s, n in enumerate(NORMS)]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(lines) + '\n{"global_step": 42, "tr')
    run = only(file)
    assert jumps(run) == [40]
    assert any("1 line could not be read" in note for note in run.notes)


def test_names_that_are_given_win_and_slips_are_told(tmp_path: Path) -> None:
    rows = [f"{s},{n},1.0,0.001" for s, n in enumerate(NORMS)]
    file = write_csv(tmp_path / "m.csv", "step,gnorm_of_mine,grad_norm,eta", rows)
    assert jumps(only(file)) == []
    run = only(file, names={"gnorm_of_mine": "gradient/norm", "eta": "learning_rate"})
    assert jumps(run) == [40]
    assert taken(run)["grad_norm"] == ("logged/grad_norm", "unknown")
    with pytest.raises(ValueError, match=r"the log has no 'gnorm_of_mind'\. Did you mean 'gnorm_of_mine'"):
        replay(file, names={"gnorm_of_mind": "gradient/norm"})
    with pytest.raises(ValueError, match=r"no signal 'gradient/norms'\. Did you mean 'gradient/norm'"):
        replay(file, names={"gnorm_of_mine": "gradient/norms"})
    with pytest.raises(ValueError, match="several names"):
        replay(file, names={"gnorm_of_mine": "gradient/norm", "grad_norm": "gradient/norm"})


def test_the_table_of_guesses() -> None:
    def signals(*names: str) -> list[str]:
        return [n.signal for n in name_signals(names)]

    assert signals("loss", "train_loss") == ["loss/value", "logged/train_loss"]  # one of them only
    assert signals("train/loss", "eval/loss") == ["loss/value", "logged/eval/loss"]
    assert signals("train_loss_step", "train_loss_epoch") == ["loss/value", "logged/train_loss_epoch"]
    assert signals("optim/total_grad_norm") == signals("l2_norm/grad/global") == ["gradient/norm"]
    assert signals("gradient/norm", "grad_norm") == ["gradient/norm", "logged/grad_norm"]  # ours needs no guess
    assert signals("lr-AdamW", "train/lr") == ["learning_rate", "logged/train/lr"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("m.csv", b"epoch,loss\n1,2\n", "no column of steps"),
        ("m.csv", b"", "no column of steps"),
        ("m.csv", b"step,word\n1,x\n", "holds no numbers"),
        ("m.jsonl", b"{{{\n", "no column of steps"),
        ("m.json", b"[1, 2]", "log_history"),
        ("m.json", b"\x00\xff", "log_history|no numbers"),
        ("m.txt", b"step 1", "expected an event file"),
        ("events.out.tfevents.1", b"\x01" * 50, "holds no numbers"),
        ("events.out.tfevents.1", b"", "holds no numbers"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=told):
        replay(tmp_path / name)
    with pytest.raises(Unreadable):
        replay(tmp_path)
    with pytest.raises(Unreadable, match="there is no log at"):
        replay(tmp_path / "nowhere")


def test_numbers_beyond_float32_are_infinite_and_told(tmp_path: Path) -> None:
    run = only(write_csv(tmp_path / "m.csv", "step,loss", ["0,1.0", "1,1e60"]))
    assert [(a.step, a.value) for a in run.alerts] == [(1, math.inf)]
