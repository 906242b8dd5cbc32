"""What is wrong is told, at the step where it is wrong; a healthy run is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf_runs.run import Text, Traced, gpt2, llama, train, transformers
from traindiag import HFTrainingDiagnostics, Threshold

LAYERS = {llama: "model.layers.{}.self_attn", gpt2: "transformer.h.{}.attn"}


@pytest.mark.parametrize("make", LAYERS)
def test_inflated_queries_and_keys_are_told_with_the_layer(make: Any, tmp_path: Path) -> None:
    diagnostics = HFTrainingDiagnostics(every_n_steps=2, terminal=False, strict=True)
    train(make(qk_scale=40.0), [diagnostics], tmp_path, steps=4)
    layers = [LAYERS[make].format(i) for i in (0, 1)]
    alert = next(a for a in diagnostics.alerts if a.family == "attention")
    assert alert.step == 0 and alert.where.startswith(tuple(layers))
    assert [c.coordinates[0] for c in diagnostics.history["attention/max_logit"].cells] == [
        layer for layer in layers for _ in range(4)
    ]


def test_logits_that_grow_are_a_warning(tmp_path: Path) -> None:
    rule = Threshold("attention/max_logit", above=60, severity="warning", name="mine")
    diagnostics = HFTrainingDiagnostics(rules=[rule], every_n_steps=2, max_overhead=None, terminal=False)
    train(llama(), [diagnostics], tmp_path, steps=20, learning_rate=0.1)
    alert = next(a for a in diagnostics.alerts if a.rule == "mine")
    assert alert.severity == "warning" and alert.step > 0 and alert.value > 60


@pytest.mark.parametrize("make", LAYERS)
def test_a_healthy_run_is_silent(make: Any, tmp_path: Path) -> None:
    diagnostics = HFTrainingDiagnostics(terminal=False, strict=True)
    train(make(), [diagnostics], tmp_path, steps=40, warmup_steps=5)
    assert [a.title for a in diagnostics.alerts if a.severity != "info"] == []


class Told(transformers.TrainerCallback):  # type: ignore[misc]
    """The step during which an alert was first there."""

    def __init__(self, diagnostics: HFTrainingDiagnostics, rule: str) -> None:
        self.diagnostics, self.rule = diagnostics, rule
        self.at: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at is None and any(a.rule == self.rule for a in self.diagnostics.alerts):
            self.at = state.global_step - 1


@pytest.mark.parametrize("step", [0, 3, 11])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_nan_is_told_within_two_steps(what: str, step: int, tmp_path: Path) -> None:
    class Breaks(Traced):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == step and what == "gradient":
                for name, parameter in model.named_parameters():
                    if name.endswith(("1.mlp.up_proj.weight", "model.norm.weight")):
                        parameter.grad.view(-1)[3] = torch.nan
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.nan if self.state.global_step == step and what == "loss" else loss

    diagnostics = HFTrainingDiagnostics(terminal=False)
    told = Told(diagnostics, "nonfinite")
    # the Trainer's own filter, on by default, keeps NaN out of the loss that it logs
    train(llama(), [diagnostics, told], tmp_path, kind=Breaks, steps=14)
    alert = next(a for a in diagnostics.alerts if a.rule == "nonfinite")
    assert alert.step == step and alert.severity == "critical"
    assert told.at is not None and told.at <= step + 2
    if what == "gradient":
        assert "model.layers.1.mlp.up_proj.weight" in alert.where + alert.evidence
    else:
        loss = diagnostics.history["loss/value"]
        assert not torch.isfinite(torch.tensor(loss.values[loss.steps == step, 0])).any()


def test_what_the_trainer_logs_and_numbers_of_your_own_can_have_limits(tmp_path: Path) -> None:
    class Mine(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            diagnostics.log("reward/kl", float(state.global_step))

    rules = [Threshold("logged/eval_loss", above=0.1), Threshold("reward/kl", above=3.5)]
    diagnostics = HFTrainingDiagnostics(rules=rules, terminal=False)
    with pytest.raises(RuntimeError, match="needs a run"):
        diagnostics.log("reward/kl", 1.0)
    train(llama(), [Mine(), diagnostics], tmp_path, eval_strategy="steps", eval_steps=2)
    assert {"logged/eval_loss above 0.1", "reward/kl above 3.5"} <= {a.rule for a in diagnostics.alerts}
    assert diagnostics.history["reward/kl"].values[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert not any(name.startswith("logged/diag_") for name in diagnostics.history)


def test_what_is_known_of_the_run(tmp_path: Path) -> None:
    diagnostics = HFTrainingDiagnostics(terminal=False)
    train(
        llama(), [diagnostics], tmp_path, steps=-1, num_train_epochs=2, data=Text(40), gradient_accumulation_steps=2,
        max_grad_norm=0.5, lr_scheduler_type="cosine", warmup_steps=7, bf16=True, seed=11,
    )  # fmt: skip
    run = diagnostics._diagnostics.run  # type: ignore[union-attr]
    assert (run.length, run.accumulate, run.clip, run.precision) == (10, 2, ("norm", 0.5), "bf16-mixed")
    assert (run.warmup, run.batch_size, run.loaded_weights, run.seed) == (7, 4, False, 11)
    assert (run.depth, run.width, run.heads, run.model) == (2, 32, 4, "LlamaForCausalLM")
    (optimizer,) = run.optimizers
    assert (optimizer.kind, optimizer.peak_lr, optimizer.schedule) == ("AdamW", 3e-3, "LambdaLR")


def test_weights_that_were_trained_before_are_known(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    diagnostics = HFTrainingDiagnostics(terminal=False)
    train(model, [diagnostics], tmp_path, steps=1)
    assert diagnostics._diagnostics.run.loaded_weights is True  # type: ignore[union-attr]
