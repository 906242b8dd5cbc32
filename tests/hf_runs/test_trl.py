"""TRL's trainers are Hugging Face's, with losses, logging and sampling of their own: what holds there holds here.

All of it on TRL's own defaults, which are not transformers': bfloat16 and checkpointed activations.
"""

from __future__ import annotations

import pydoc_data.topics
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from huggingface_hub import constants
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from tests.hf_runs.run import CONTEXT, Trace, Traced, llama, transformers
from traindiag import HFTrainingDiagnostics, Threshold

STEPS, SAVED, KILLED = 12, 6, 8
_TOPICS: list[str] = [text for text in pydoc_data.topics.topics.values() if len(text) > 200]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL tells its makers of each trainer that is built, unless it is told not to."""

    def refuse(*_: Any) -> None:
        raise OSError("these tests need no network")

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def tokenizer() -> Any:
    """A token a byte. Two characters that bytes of text do not use end a text and fill it up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=alphabet[-1], pad_token=alphabet[-2])


class SFT(Traced, trl.SFTTrainer):  # type: ignore[misc]
    pass


class OwnLoss(SFT):
    """The loss written out, as the documentation says to do for one of one's own."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


class DPO(Traced, trl.DPOTrainer):  # type: ignore[misc]
    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model, llama(), **arguments)  # a reference model of its own, never watched


class GRPO(Traced, trl.GRPOTrainer):  # type: ignore[misc]
    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model, self.variety, **arguments)

    @staticmethod
    def variety(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]


def pieces(length: int, start: int = 0) -> list[str]:
    return [text[start : start + length] for text in _TOPICS[:96]]


# trainer, its settings, the columns of its data and what else is particular to it
KINDS: dict[str, tuple[type, type, dict[str, list[str]], dict[str, Any]]] = {
    "sft": (SFT, trl.SFTConfig, {"text": pieces(200)}, {"max_length": CONTEXT}),
    "own_loss": (OwnLoss, trl.SFTConfig, {"text": pieces(200)}, {"max_length": CONTEXT}),
    "dpo": (
        DPO,
        trl.DPOConfig,
        {"prompt": pieces(8), "chosen": pieces(8, 8), "rejected": pieces(8, 16)},
        {"max_length": CONTEXT, "gradient_accumulation_steps": 2},
    ),
    "grpo": (
        GRPO,
        trl.GRPOConfig,
        {"prompt": pieces(8)},
        {"max_completion_length": 8, "num_generations": 4, "steps_per_generation": 2},
    ),
}


def train(
    kind: str, callbacks: Sequence[Any], folder: Path, *, steps: int = 6, resume: bool | None = None, **options: Any
) -> Trace:
    """Trains and gives back the trace."""
    trainer_class, settings_class, columns, particular = KINDS[kind]
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that transformers has given up and TRL has not
        settings = settings_class(
            str(folder),
            **{
                "per_device_train_batch_size": 4,
                "max_steps": steps,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "dataloader_pin_memory": False,
                **particular,
                **options,
            },
        )
        trainer = trainer_class(
            model,
            args=settings,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer(),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=resume)
    assert "training_step" not in vars(trainer)  # nothing of ours is left
    trace: Trace = trainer.trace
    trace.parameters = [p.detach().clone() for p in model.parameters()]
    trace.rng = torch.get_rng_state()
    timed = ("runtime", "per_second", "step_time")
    trace.logs = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
    return trace


def watching(**options: Any) -> HFTrainingDiagnostics:
    return HFTrainingDiagnostics(
        **{"every_n_steps": 2, "max_overhead": None, "strict": True, "terminal": False, **options}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_neutral(kind: str, tmp_path: Path) -> None:
    without = train(kind, [], tmp_path)
    diagnostics = watching()
    with_it = train(kind, [diagnostics], tmp_path)
    assert without.equals(with_it)
    assert diagnostics.history["attention/max_logit"].steps.tolist() == [0, 2, 4]  # it did look
    assert diagnostics.alerts == []


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    class Disturb(HFTrainingDiagnostics):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)
            super().on_step_begin(*args, **kwargs)

    without = train("grpo", [], tmp_path)
    assert not without.equals(train("grpo", [Disturb(terminal=False)], tmp_path))  # other texts were drawn


class FirstBlock(transformers.TrainerCallback):  # type: ignore[misc]
    """Mean square and count of what the first block returned in training, taken down by step."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[float, int]]] = []
        self.passes_without_gradient = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.model.layers[0].register_forward_hook(self._returned)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append([])

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled():
            self.steps[-1].append((output.detach().double().square().sum().item(), output.numel()))
        else:
            self.passes_without_gradient += 1

    def rms(self) -> list[float]:
        return [float(np.sqrt(sum(s for s, _ in step) / sum(n for _, n in step))) for step in self.steps]


@pytest.mark.parametrize("kind", KINDS)
def test_seen_is_the_model_that_trains_in_the_pass_that_trains_it(kind: str, tmp_path: Path) -> None:
    """Not DPO's reference model, and no pass in which GRPO samples from the model."""
    truth, diagnostics = FirstBlock(), watching(every_n_steps=1)
    trace = train(kind, [truth, diagnostics], tmp_path)
    history = diagnostics.history
    np.testing.assert_allclose(history["activation/rms"].values[:, 0], truth.rms(), rtol=1e-4)
    assert (truth.passes_without_gradient > 0) == (kind == "grpo")

    accumulated = KINDS[kind][3].get("gradient_accumulation_steps", 1)
    losses = torch.stack(trace.losses).view(-1, accumulated).sum(1)
    np.testing.assert_allclose(history["loss/value"].values[:, 0], losses.numpy(), rtol=1e-6)
    np.testing.assert_allclose(history["gradient/norm"].values[:, 0], trace.logged("grad_norm"), rtol=1e-4)
    assert history["attention/entropy"].grid("layer", "head").shape == (6, 2, 4)
    assert {"optimizer/rms_t", "optimizer/update_rms", "gradient/rms"} <= set(history)
    assert all(np.isfinite(s.values).all() for name, s in history.items() if not name.startswith("logged/"))
    sight = {row.family: row.sight for row in diagnostics.coverage if row.sight != "unseen"}
    assert set(sight) >= {"attention", "activation", "gradient", "loss", "optimizer", "wiring"}
    assert sight["gradient"] == sight["optimizer"] == sight["loss"] == "exact"


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_seen_although_logits_are_never_built(kind: str, tmp_path: Path) -> None:
    """TRL computes log-probabilities from the head's weight in tiles: of logits nobody sees more than their tile."""
    diagnostics = watching()
    train(kind, [diagnostics], tmp_path, steps=3)
    (row,) = (row for row in diagnostics.coverage if row.family == "output")
    assert row.sight == "exact" and {"output/log_z", "output/target_z_score"} <= set(diagnostics.history)


def test_what_trl_computes_itself_can_be_judged(tmp_path: Path) -> None:
    rules = [Threshold("logged/rewards/margins", above=-1e9, name="margin"), Threshold("logged/entropy", above=1.0)]
    diagnostics = watching(rules=rules)
    trace = train("dpo", [diagnostics], tmp_path)
    logged = diagnostics.history["logged/rewards/margins"].values[:, 0]
    np.testing.assert_allclose(logged, trace.logged("rewards/margins")[: len(logged)], rtol=1e-6)
    assert {alert.signal for alert in diagnostics.alerts} == {"logged/rewards/margins", "logged/entropy"}


class Rows(transformers.TrainerCallback):  # type: ignore[misc]
    """Whoever reads what is logged."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.names |= set(logs)


def test_its_rows_carry_the_aggregates_to_the_loggers_and_its_history_stays_its_own(tmp_path: Path) -> None:
    mine = Rows()
    without = train("sft", [], tmp_path / "without", report_to="tensorboard")
    with_it = train("sft", [watching(), mine], tmp_path / "with", report_to="tensorboard")
    assert with_it.logs == without.logs
    assert not any("diag_" in name for name in mine.names.union(*with_it.logs)) and "entropy" in mine.names

    (folder,) = {f.parent for f in (tmp_path / "with").rglob("events*") if f.parent.name != "traindiag"}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("attention/max_logit", "gradient/norm", "optimizer/update_ratio"):
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"train/diag_{name}")]
        assert tags and all(events.Scalars(tag) for tag in tags), name
    assert len(events.Scalars("train/entropy")) == 6  # TRL's own points are all there


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            raise KeyboardInterrupt


def test_resumed_sft_is_one_run(tmp_path: Path) -> None:
    def saved() -> HFTrainingDiagnostics:
        rules = [Threshold("loss/value", below=5.2, persistence=2, name="low", severity="info")]
        return watching(rules=rules)

    options: dict[str, Any] = {"steps": STEPS, "save_strategy": "steps", "save_steps": SAVED}
    unbroken = saved()
    whole = train("sft", [unbroken], tmp_path / "unbroken", **options)
    assert unbroken.alerts

    first, second = saved(), saved()
    with pytest.raises(KeyboardInterrupt):
        train("sft", [first, Kill()], tmp_path / "killed", **options)
    first.detach()
    resumed = train("sft", [second], tmp_path / "killed", resume=True, **options)
    assert all(a.equal(b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert second.history["loss/value"].steps.tolist() == list(range(SAVED, STEPS))

    told = {(a.id, a.status): a for a in first.alerts + second.alerts}
    assert [(a.rule, a.status, a.step, a.value) for a in sorted(told.values(), key=lambda a: a.step)] == [
        (a.rule, a.status, a.step, a.value) for a in unbroken.alerts
    ]
    assert len({a.run for a in told.values()}) == 1
