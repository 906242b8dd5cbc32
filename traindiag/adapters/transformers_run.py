"""What can be known of a Hugging Face run when it begins."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState, TrainingArguments

_MIXED = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp8": "fp8-mixed"}
_TRUE = {torch.float32: "32-true", torch.bfloat16: "bf16-true", torch.float16: "16-true", torch.float64: "64-true"}


def calling_trainer() -> tuple[Trainer | None, Path | None]:
    """The Trainer that is calling us, and the checkpoint that it resumes from.

    Callbacks are handed neither. Both are arguments of ``Trainer.train``, which is running.
    """
    trainer: Trainer | None = None
    frame = inspect.currentframe()
    while frame is not None:
        if "self" in frame.f_code.co_varnames:
            found = frame.f_locals
            caller, checkpoint = found.get("self"), found.get("resume_from_checkpoint")
            if isinstance(caller, Trainer) and trainer in (None, caller):
                trainer = caller
                if isinstance(checkpoint, (str, os.PathLike)):
                    return trainer, Path(checkpoint)
        frame = frame.f_back
    return trainer, None


def facts(trainer: Trainer, args: TrainingArguments, state: TrainerState, model: nn.Module) -> dict[str, Any]:
    """Fields of :class:`~traindiag.record.run_info.RunInfo` that the Trainer knows."""
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), None)
    return {
        "length": state.max_steps if state.max_steps > 0 else None,
        "accumulate": args.gradient_accumulation_steps,
        "clip": ("norm", float(args.max_grad_norm)) if args.max_grad_norm else None,
        "precision": _MIXED.get(str(trainer.accelerator.mixed_precision)) or (_TRUE.get(dtype) if dtype else None),
        "seed": args.seed,
        "world_size": args.world_size,
    }


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that does the work, inside accelerate's wrappers: its hooks are the ones that are called."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def log_folder(args: TrainingArguments, callbacks: Iterable[object]) -> Path:
    """A folder beside the Trainer's own TensorBoard log, if it has one; otherwise in its output folder."""
    known = (getattr(owner, "logging_dir", None) for owner in (*callbacks, args))
    return Path(next((folder for folder in known if folder), args.output_dir or ".")) / "traindiag"
