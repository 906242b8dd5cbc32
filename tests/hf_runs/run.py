"""A small real run of Hugging Face's Trainer: tiny models, random weights, the standard library's text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from traindiag.demo.data import standard_library

transformers = pytest.importorskip("transformers")

CONTEXT = 24
_TEXT = standard_library()[0][:50_000].long()


class Text(Dataset[dict[str, Tensor]]):
    """Windows of bytes; with ``ragged``, each has another number of tokens that count."""

    def __init__(self, count: int, *, ragged: bool = False) -> None:
        self.count, self.ragged = count, ragged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = _TEXT[index * CONTEXT : (index + 1) * CONTEXT]
        labels = tokens.clone()
        labels[0] = -100  # nothing predicts it, and not every model's loss leaves it out of the count
        if self.ragged:
            labels[2 + 7 * index % (CONTEXT - 2) :] = -100
        return {"input_ids": tokens, "labels": labels}


def llama(qk_scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= qk_scale
            layer.self_attn.k_proj.weight *= qk_scale
    return model  # type: ignore[no-any-return]


def gpt2(qk_scale: float = 1.0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, attn_pdrop=dropout, resid_pdrop=dropout,
        embd_pdrop=dropout, bos_token_id=0, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= qk_scale
    return model  # type: ignore[no-any-return]


@dataclass
class Trace:
    """What a run left behind, to be compared bit for bit."""

    losses: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    rng: Tensor | None = None
    logs: list[dict[str, Any]] = field(default_factory=list)

    def equals(self, other: Trace) -> bool:
        return (
            len(self.losses) == len(other.losses)
            and all(a.equal(b) for a, b in zip(self.losses, other.losses))
            and all(a.equal(b) for a, b in zip(self.parameters, other.parameters))
            and self.rng is not None
            and other.rng is not None
            and self.rng.equal(other.rng)
            and self.logs == other.logs
        )

    def logged(self, name: str) -> list[float]:
        return [row[name] for row in self.logs if name in row]


class Traced(transformers.Trainer):  # type: ignore[misc]
    """Keeps the loss of every micro-batch, as a Trainer of the user's own would."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace = Trace()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.trace.losses.append(loss.clone())
        return loss


class OwnLoop(Traced):
    """A subclass with a loop of its own, as some that sample from the model have."""

    def _inner_training_loop(self, *_: Any, **__: Any) -> None:
        self.create_optimizer()
        handler = self.callback_handler
        handler.optimizer = self.optimizer
        self.current_gradient_accumulation_steps = 1
        self.control = handler.on_train_begin(self.args, self.state, self.control)
        for batch in list(self.get_train_dataloader())[: self.args.max_steps]:
            self.control = handler.on_step_begin(self.args, self.state, self.control)
            self.one_step(batch)
            self.model.zero_grad()
            self.state.global_step += 1
            self.control = handler.on_step_end(self.args, self.state, self.control)
        self.control = handler.on_train_end(self.args, self.state, self.control)

    def one_step(self, batch: dict[str, Tensor]) -> None:
        self.model(**batch).loss.backward()
        self.optimizer.step()


def build(
    model: nn.Module,
    callbacks: Sequence[Any],
    folder: Path,
    *,
    steps: int = 6,
    kind: type = Traced,
    data: Dataset[Any] | None = None,
    **arguments: Any,
) -> Any:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.TrainingArguments(str(folder), **options)
        evaluated = Text(8) if settings.eval_strategy != "no" else None
        trainer = kind(
            model, settings, train_dataset=data or Text(400), eval_dataset=evaluated, callbacks=list(callbacks)
        )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(model: nn.Module, callbacks: Sequence[Any], folder: Path, *, resume: Any = None, **options: Any) -> Trace:
    """Trains and gives back the trace."""
    trainer = build(model, callbacks, folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    trace: Trace = trainer.trace
    trace.parameters = [p.detach().clone() for p in model.parameters()]
    trace.rng = torch.get_rng_state()
    timed = ("runtime", "per_second")
    trace.logs = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
    return trace
