"""The callback for Hugging Face's Trainer: its hooks mapped onto the engine, and nothing else."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ImportError(
        "traindiag.HFTrainingDiagnostics is a callback of Hugging Face's Trainer: run `pip install "
        "'transformers[torch]'`, or use traindiag.Diagnostics, which watches any loop"
    ) from error
from torch import nn
from torch.optim import Optimizer

from traindiag.adapters.callback import DiagnosticsCallback
from traindiag.adapters.transformers_logs import Passengers
from traindiag.adapters.transformers_run import calling_trainer, facts, innermost, log_folder
from traindiag.adapters.transformers_tap import TrainerTap
from traindiag.engine.diagnostics import Diagnostics
from traindiag.engine.outlet import Outlet
from traindiag.engine.state_file import read_state, write_state
from traindiag.panels.sinks import FileSink


class HFTrainingDiagnostics(DiagnosticsCallback, TrainerCallback):
    """Watches a run of Hugging Face's Trainer and tells what is going wrong before the loss shows it.

    Its arguments are those of :meth:`~traindiag.adapters.callback.DiagnosticsCallback.__init__`. Trainers derived
    from it are watched as long as their loop calls ``training_step``. The state of diagnostics lies in each
    checkpoint as ``traindiag.pt``, and ``train(resume_from_checkpoint=...)`` goes on with it.

    The Trainer tells no callback of an exception. One in a forward or backward pass or in the computation of a loss
    ends diagnostics like the end of the run does. After one elsewhere (data loading, evaluation, another callback)
    no model is hooked either, but two hooks stay on the optimizer and ``training_step`` stays replaced until the next
    ``train()``, :meth:`detach`, or until this callback is garbage-collected, the interpreter's exit included.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> diagnostics = HFTrainingDiagnostics(every_n_steps=20)
        >>> trainer = Trainer(nn.Linear(1, 1), TrainingArguments("out", report_to="none"), callbacks=[diagnostics])
        >>> diagnostics.alerts
        []
    """

    _tap: TrainerTap | None = None
    _at_exit: weakref.finalize[Any, Any] | None = None
    _raised: BaseException | None = None
    _wishes: list[str]
    _outlet: Outlet
    _passengers: Passengers

    def detach(self) -> None:
        """Judges what is under way and takes everything off; needed only after an exception, safe at any time."""
        self._remove(failed=True)

    # -- hooks ---------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: object = None,
        **_: Any,
    ) -> None:
        self._remove(failed=True)  # of a run that an exception has ended
        trainer, checkpoint = calling_trainer()
        if trainer is None or model is None or optimizer is None:
            warnings.warn(
                "traindiag: nothing is measured: HFTrainingDiagnostics works in train() of Hugging Face's Trainer; "
                "traindiag.Diagnostics watches any loop",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        folder = log_folder(args, trainer.callback_handler.callbacks)
        self._passengers = Passengers()
        wishes = self._wishes = []
        self._raised = None
        self._outlet = Outlet(
            self._settings,
            sink=FileSink(folder),
            folder=folder,
            show=folder.parent,
            loggers=[self._passengers.wait],
        )

        def new() -> Diagnostics:
            return Diagnostics(
                model,
                innermost(optimizer),
                settings=self._settings,
                outlet=self._outlet,
                schedulers=[lr_scheduler],
                save=wishes.append,
                facts=facts(trainer, args, state, model),
            )

        self._diagnostics = new()
        if checkpoint is not None and (problem := self._resume(self._diagnostics, checkpoint)):
            self._diagnostics.finish()
            self._diagnostics = new()
            self._outlet.say(f"this job begins a new run of diagnostics: {problem}; training goes on")
        self._diagnostics.computes_in(trainer.compute_loss_context_manager)
        self._tap = TrainerTap(trainer, self._diagnostics, first=self._passengers)
        self._tap.place()
        self._at_exit = weakref.finalize(self, self._tap.remove, failed=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tap is not None:
            self._tap.place()  # a loop that survives an exception goes on being watched

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tap is None:
            return
        if not self._tap.used:
            self._outlet.say(
                "nothing is measured: the loop of this Trainer does not call training_step; "
                "traindiag.Diagnostics.attach(model, optimizer) watches it"
            )
            self._remove()
            return
        diagnostics = self._tap.diagnostics
        try:
            diagnostics.end()
        except BaseException as error:  # what an alert raises; the Trainer tells no callback of it
            if not self._wishes:
                self._remove(failed=True)
                raise
            self._raised = error  # the checkpoint first: the Trainer saves when this hook is over
        control.should_training_stop = control.should_training_stop or diagnostics.should_stop
        control.should_save = control.should_save or bool(self._wishes)
        self._wishes.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tap is not None:
            self._tap.diagnostics.idle()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._tap is None or logs is None:
            return
        self._passengers.get_out(logs)
        for name, value in logs.items():
            if isinstance(value, (int, float)):
                self._tap.diagnostics.log(f"logged/{name}", value)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._tap is None:
            return
        diagnostics = self._tap.diagnostics
        kept = diagnostics.state_dict()  # on every rank: it waits for what is on its way between them
        try:
            write_state(kept, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")
        except OSError as error:
            self._outlet.say(f"the checkpoint holds no state of diagnostics: {error}; training goes on")
        diagnostics.idle()
        if (raised := self._raised) is not None:
            self._raised = None
            self._remove(failed=True)
            raise raised

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._remove()

    # -- inside --------------------------------------------------------------------------------

    @staticmethod
    def _resume(diagnostics: Diagnostics, checkpoint: Path) -> str:
        """Goes on from a checkpoint; otherwise what is wrong with it."""
        state, problem = read_state(checkpoint)
        if state is not None:
            try:
                diagnostics.load_state_dict(state)
            except ValueError as error:
                return str(error)
            except (KeyError, TypeError, AttributeError) as error:
                return f"the state in {checkpoint} is not one of traindiag: {type(error).__name__}: {error}"
        return problem

    def _remove(self, *, failed: bool = False) -> None:
        tap, self._tap = self._tap, None
        if self._at_exit is not None:
            self._at_exit.detach()
            self._at_exit = None
        if tap is not None:
            tap.remove(failed=failed)
