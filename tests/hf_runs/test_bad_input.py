"""Bad input gets a clear message, and never ends a run that could go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_runs.run import OwnLoop, build, llama, train, transformers
from traindiag import HFTrainingDiagnostics


def test_a_wrong_argument_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be a whole number of at least 1, got 0"):
        HFTrainingDiagnostics(every_n_steps=0)
    with pytest.raises(TypeError, match="every_n_step"):
        HFTrainingDiagnostics(every_n_step=2)  # type: ignore[call-arg]


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "diagnostics.yaml"
    file.write_text("every_n_steps: 3\nterminal: false\nrules: [{Threshold: {signal: loss/value, above: 1e-3}}]")
    diagnostics = HFTrainingDiagnostics.from_yaml(file)
    assert isinstance(diagnostics, HFTrainingDiagnostics)
    train(llama(), [diagnostics], tmp_path)
    assert any(a.rule == "loss/value above 0.001" for a in diagnostics.alerts)


def test_before_a_run_there_is_nothing_to_see() -> None:
    diagnostics = HFTrainingDiagnostics()
    assert diagnostics.alerts == [] and list(diagnostics.history) == [] and diagnostics.coverage == ()
    diagnostics.detach()


def test_a_loop_that_is_not_the_trainers_is_told(tmp_path: Path) -> None:
    diagnostics = HFTrainingDiagnostics(terminal=False)
    trainer = build(llama(), [diagnostics], tmp_path, kind=OwnLoop)
    with pytest.warns(RuntimeWarning, match=r"does not call training_step.*Diagnostics\.attach") as told:
        trainer.train()
    assert len([w for w in told if "training_step" in str(w.message)]) == 1
    assert "training_step" not in vars(trainer)


def test_outside_of_a_trainer_it_says_so(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    diagnostics = HFTrainingDiagnostics()
    with pytest.warns(RuntimeWarning, match=r"nothing is measured: HFTrainingDiagnostics works in train\(\)"):
        diagnostics.on_train_begin(
            arguments,
            transformers.TrainerState(),
            transformers.TrainerControl(),
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
        )
    diagnostics.on_step_end(arguments, transformers.TrainerState(), transformers.TrainerControl())


def test_a_model_that_is_no_language_model_is_watched(tmp_path: Path) -> None:
    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(24, 1)

        def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
            return {"loss": self.linear(input_ids / 256).square().mean()}

    diagnostics = HFTrainingDiagnostics(terminal=False, strict=True)
    trace = train(Regression(), [diagnostics], tmp_path, gradient_accumulation_steps=2)
    assert diagnostics.history["loss/value"].values[:, 0].tolist() == pytest.approx(trace.logged("loss"), abs=5e-5)
    assert diagnostics.history["gradient/norm"].values[:, 0].tolist() == pytest.approx(trace.logged("grad_norm"))


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import traindiag\n"
        "try: traindiag.HFTrainingDiagnostics\n"
        "except ImportError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'transformers[torch]'" in told and "traindiag.Diagnostics" in told
