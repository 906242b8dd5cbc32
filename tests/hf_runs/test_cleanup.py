"""Nothing is left behind. The Trainer calls no hook on an exception, so where one is raised makes a difference."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf_runs.run import OwnLoop, Text, Traced, build, llama, transformers
from tests.lightning_runs.test_cleanup import NOTHING, leftovers
from traindiag import HFTrainingDiagnostics
from traindiag.adapters.transformers_run import innermost

ONLY_OPTIMIZER = {**NOTHING, "optimizer hooks": 2}


def look(trainer: Any) -> dict[str, int]:
    return leftovers(trainer.model, innermost(trainer.optimizer))


def is_as_before(trainer: Any) -> bool:
    kinds = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    return "training_step" not in vars(trainer) and "Passengers" not in kinds


def watching() -> HFTrainingDiagnostics:
    return HFTrainingDiagnostics(every_n_steps=1, max_overhead=None, terminal=False)


class RaisesInside(Traced):
    """Raises in the third step, in a part of ``training_step``."""

    where = "forward"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.error: BaseException = RuntimeError("boom")
        self.model.model.layers[1].register_forward_hook(lambda *_: self._maybe("forward"))

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self._maybe("loss")
        loss.register_hook(lambda _: self._maybe("backward"))
        return loss

    def _maybe(self, where: str) -> None:
        if where == self.where and self.state.global_step == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_after_an_exception_in_a_micro_batch(where: str, error: BaseException, tmp_path: Path) -> None:
    diagnostics = watching()
    trainer = build(llama(), [diagnostics], tmp_path, kind=RaisesInside)
    trainer.where, trainer.error = where, error
    with pytest.raises(type(error)):
        trainer.train()
    mine = sum(len(m._forward_hooks) for m in trainer.model.modules())  # the test's own
    assert look(trainer) == {**NOTHING, "module hooks": mine} and mine == 1
    assert is_as_before(trainer)
    assert len(diagnostics.history["gradient/norm"]) == 2


class RaisesBetween(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._raise)

    def _raise(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= 2:
            raise RuntimeError("boom")


class Torn(Text):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.seen >= 16:
            raise OSError("disk")
        self.seen += 1
        return super().__getitem__(index)

    seen = 0


BETWEEN: dict[str, dict[str, Any]] = {
    "on_step_begin": {},
    "on_pre_optimizer_step": {},
    "on_optimizer_step": {},
    "on_step_end": {},
    "on_log": {},
    "on_evaluate": {"eval_strategy": "steps", "eval_steps": 1},
    "data": {"data": Torn(400)},
}


def break_between(hook: str, folder: Path, diagnostics: HFTrainingDiagnostics) -> Any:
    callbacks = [diagnostics] if hook == "data" else [diagnostics, RaisesBetween(hook)]
    trainer = build(llama(), callbacks, folder, **BETWEEN[hook])
    with pytest.raises((RuntimeError, OSError)) as raised:
        trainer.train()
    del raised  # its traceback holds every frame
    return trainer


@pytest.mark.parametrize("hook", BETWEEN)
def test_after_an_exception_elsewhere_no_model_is_hooked(hook: str, tmp_path: Path) -> None:
    diagnostics = watching()
    trainer = break_between(hook, tmp_path, diagnostics)
    assert look(trainer) == ONLY_OPTIMIZER
    diagnostics.detach()
    assert look(trainer) == NOTHING and is_as_before(trainer)
    assert len(diagnostics.history["gradient/norm"]) >= 2  # what was under way has been judged
    diagnostics.detach()  # safe to call again


def test_after_garbage_collection(tmp_path: Path) -> None:
    trainer = break_between("on_step_end", tmp_path, watching())
    model, optimizer = trainer.model, innermost(trainer.optimizer)
    assert leftovers(model, optimizer) == ONLY_OPTIMIZER
    del trainer
    gc.collect()
    assert leftovers(model, optimizer) == NOTHING


def test_a_callback_that_was_taken_away_can_be_collected(tmp_path: Path) -> None:
    trainer = break_between("on_step_end", tmp_path, watching())
    trainer.remove_callback(HFTrainingDiagnostics)
    gc.collect()
    assert look(trainer) == NOTHING and is_as_before(trainer)


def test_the_next_training_begins_clean(tmp_path: Path) -> None:
    diagnostics = watching()
    trainer = break_between("on_optimizer_step", tmp_path, diagnostics)
    trainer.remove_callback(RaisesBetween)
    trainer.train()
    assert look(trainer) == NOTHING and is_as_before(trainer)
    assert diagnostics.history["gradient/norm"].steps.tolist() == list(range(6))


def test_after_a_normal_end(tmp_path: Path) -> None:
    trainer = build(llama(), [watching()], tmp_path)
    trainer.train()
    assert look(trainer) == NOTHING and is_as_before(trainer)


def test_a_training_step_of_the_users_own_is_put_back(tmp_path: Path) -> None:
    diagnostics = watching()
    trainer = build(llama(), [diagnostics], tmp_path)
    original, calls = trainer.training_step, []

    def mine(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[no-any-return]

    trainer.training_step = mine
    trainer.train()
    assert vars(trainer)["training_step"] is mine
    assert len(calls) == 6 == len(diagnostics.history["loss/value"])


def test_nothing_is_installed_outside_a_sampled_forward_pass(tmp_path: Path) -> None:
    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[tuple[str, dict[str, int]]] = []

        def __getattribute__(self, name: str) -> Any:
            if name in (
                "on_step_begin",
                "on_substep_end",
                "on_pre_optimizer_step",
                "on_step_end",
                "on_prediction_step",
            ):
                return lambda args, state, control, model, optimizer, **_: self.seen.append(
                    (name, leftovers(model, innermost(optimizer)))
                )
            return super().__getattribute__(name)

    look = Look()
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    build(llama(), [watching(), look], tmp_path, **options).train()
    assert {name for name, _ in look.seen} >= {"on_substep_end", "on_pre_optimizer_step", "on_prediction_step"}
    assert all(entry == ONLY_OPTIMIZER for _, entry in look.seen)


def test_between_samples_the_model_is_untouched(tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    class Looks(Traced):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen[self.state.global_step] = leftovers(model, None)["global hooks"]
            return super().compute_loss(model, *args, **kwargs)

    diagnostics = HFTrainingDiagnostics(every_n_steps=3, max_overhead=None, terminal=False)
    build(llama(), [diagnostics], tmp_path, kind=Looks).train()
    assert [step for step, hooks in seen.items() if hooks] == [0, 3]


def test_a_loop_that_survives_an_exception_goes_on_being_watched(tmp_path: Path) -> None:
    class Survives(OwnLoop):
        def one_step(self, batch: dict[str, Tensor]) -> None:
            try:
                self.training_step(self.model, batch)
            except torch.OutOfMemoryError:
                return
            self.optimizer.step()

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().compute_loss(*args, **kwargs)

    diagnostics = watching()
    trainer = build(llama(), [diagnostics], tmp_path, kind=Survives)
    trainer.train()
    assert diagnostics._diagnostics is not None and diagnostics._diagnostics.updates == {"AdamW": 5}
    assert len(diagnostics.history["gradient/norm"]) == 5
    assert look(trainer) == NOTHING and is_as_before(trainer)
