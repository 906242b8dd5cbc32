"""Nothing is left behind: no hook, no mode, whatever way a run ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.modules import module as module_internals

from tests.lightning_runs.run import Automatic, DropoutGPT, Trace, fit
from traindiag import Diagnostics, TrainingDiagnostics


def leftovers(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    modules = list(model.modules())
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "global hooks": len(module_internals._global_forward_hooks) + len(module_internals._global_forward_pre_hooks),
        "module hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "parameter hooks": sum(len(p._backward_hooks or ()) for p in model.parameters()),
        "optimizer hooks": 0
        if optimizer is None
        else len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
    }


NOTHING = {"function modes": 0, "global hooks": 0, "module hooks": 0, "parameter hooks": 0, "optimizer hooks": 0}


class Raise(Callback):
    """Ends a run at one hook of its third step."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.optimizer: Any = None
        setattr(self, hook, self._raise)
        self.error = error

    def _raise(self, trainer: Any, *args: Any) -> None:
        self.optimizer = trainer.optimizers[0]
        if trainer.global_step >= 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    ],
)
def test_after_an_exception(hook: str, error: BaseException) -> None:
    module = Automatic(DropoutGPT(), Trace())
    raiser = Raise(hook, error)
    diagnostics = TrainingDiagnostics(every_n_steps=1, terminal=False)
    with pytest.raises((RuntimeError, SystemExit)):
        fit([diagnostics, raiser], module=module)
    assert leftovers(module, raiser.optimizer) == NOTHING


def test_after_an_exception_inside_the_model() -> None:
    class Breaks(DropoutGPT):
        calls = 0

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                self.net.blocks[1].mlp = None
            return super().forward(tokens)

    module = Automatic(Breaks(), Trace())
    with pytest.raises(TypeError):
        fit([TrainingDiagnostics(every_n_steps=1, terminal=False)], module=module, validation=False)
    assert leftovers(module, None) == NOTHING


def test_after_a_normal_end() -> None:
    module = Automatic(DropoutGPT(), Trace())
    fit([TrainingDiagnostics(terminal=False)], module=module)
    assert leftovers(module, None) == NOTHING


def test_between_samples_the_model_is_untouched() -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, int]] = []

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            if trainer.global_step % 3:
                self.seen.append(leftovers(pl_module, None))

    look = Look()
    fit([TrainingDiagnostics(every_n_steps=3, terminal=False), look], validation=False)
    assert look.seen and all(entry == NOTHING for entry in look.seen)


def test_attached_and_detached() -> None:
    model = DropoutGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics.attach(model, optimizer, terminal=False)
    assert leftovers(model, optimizer) != NOTHING
    diagnostics.detach()
    assert leftovers(model, optimizer) == NOTHING


def test_a_loop_that_catches_its_exceptions_goes_on() -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, terminal=False)
    for batch in range(5):
        try:
            with diagnostics.step() as step:
                step.loss(model(torch.ones(2, 4)).square().mean()).backward()
                if batch == 2:
                    raise torch.OutOfMemoryError("out of memory")
                optimizer.step()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
    diagnostics.finish()
    assert diagnostics.updates == {"SGD": 4}
    assert diagnostics.history["gradient/norm_applied"].steps.tolist() == [0, 1, 3, 4]
    assert leftovers(model, optimizer) == NOTHING
