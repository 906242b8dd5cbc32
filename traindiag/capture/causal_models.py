"""Causal language models of Hugging Face that compute their loss unseen and leave their head alone.

What the base model returns is what the head would be given, and ``labels`` are shifted by one inside. So the logits
of a few tokens can be computed, where a fused loss is not recognised by its own call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from traindiag.capture import torch_private
from traindiag.capture.fused import NotRead, scale_of, shifted, softcap_of, tensor_of
from traindiag.capture.outputs import activation_of
from traindiag.capture.taps import LossCall
from traindiag.functional.output import choose_tokens

_SELF_COMPUTED = "ForCausalLM"


@dataclass(slots=True)
class _Model:
    """One model, and what is known of the call of it that is under way."""

    model: Any
    base: nn.Module
    head: nn.Module
    name: str
    head_name: str
    told: int | None = None
    hidden: Tensor | None = None
    head_called: bool = False


class CausalModels:
    """Follows the calls of such models among watched modules.

    Args:
        modules: Watched modules by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._models = list(_find(modules))
        self._parts = {id(part) for m in self._models for part in (m.model, m.base, m.head)}

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models themselves."""
        return tuple(m.model for m in self._models)

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Their heads by name."""
        return {m.head_name: m.head for m in self._models}

    def forget(self) -> None:
        """Whatever is under way does not count."""
        for known in self._models:
            known.told, known.hidden, known.head_called = None, None, False

    def enter(self, module: nn.Module, told: int) -> None:
        """A module is called.

        Args:
            module: The module.
            told: How many losses have been seen so far.
        """
        if id(module) in self._parts:
            for known in self._models:
                if known.model is module:
                    known.told, known.hidden, known.head_called = told, None, False

    def leave_part(self, module: nn.Module, output: object) -> None:
        """A base model or a head returns, or some other module.

        Args:
            module: The module.
            output: What it returns.
        """
        if id(module) in self._parts:
            for known in (m for m in self._models if m.told is not None):
                if module is known.head:
                    known.head_called = True
                if module is known.base:
                    found = activation_of(output)
                    known.hidden = None if found is None else found.detach()

    def leave(
        self, module: nn.Module, kwargs: Mapping[str, object], output: object, told: int, *, tokens: int
    ) -> tuple[str, str, LossCall | str] | None:
        """A model returns.

        Args:
            module: The model.
            kwargs: Its keyword arguments.
            output: What it returns.
            told: How many losses have been seen so far.
            tokens: Number of tokens to look at, at most.

        Returns:
            Names of the model and of its head, and what the loss says of a few tokens, or why it says nothing; None
            where the loss has been seen or there is none.
        """
        known = next((m for m in self._models if m.model is module), None)
        if known is None:
            return None
        unseen = known.told == told and not known.head_called
        hidden, known.told, known.hidden = known.hidden, None, None
        labels = kwargs.get("labels")
        if not (unseen and isinstance(labels, Tensor) and _has_a_loss(output)):
            return None
        try:
            return known.name, known.head_name, _read(known, hidden, labels, tokens)
        except NotRead as why:
            return known.name, known.head_name, f"logits are never built, and {why}"


def _find(modules: Mapping[str, nn.Module]) -> Iterator[_Model]:
    names = {id(m): n for n, m in modules.items()}
    module: Any
    for name, module in modules.items():
        if getattr(module, "loss_type", None) != _SELF_COMPUTED or not hasattr(module, "get_output_embeddings"):
            continue
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            continue  # some scale what their head is given
        try:
            head, base = module.get_output_embeddings(), module.base_model
        except Exception:  # somebody's own code
            continue
        if isinstance(head, nn.Module) and isinstance(base, nn.Module) and base is not module and id(head) in names:
            yield _Model(module, base, head, name, names[id(head)])


def _has_a_loss(output: object) -> bool:
    """Whether a model returned a loss that trains: by name, or as the first of several things."""
    first = output[0] if isinstance(output, tuple) and output else None
    loss = output.get("loss") if isinstance(output, Mapping) else first
    return isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad


def _read(known: _Model, hidden: Tensor | None, labels: Tensor, tokens: int) -> LossCall:
    weight, bias = tensor_of(known.head, "weight"), tensor_of(known.head, "bias")
    if hidden is None:
        raise NotRead("the hidden states are not seen")
    odd = next((t for t in (hidden, weight, bias, labels) if t is not None and not torch_private.is_plain(t)), None)
    if odd is not None:
        raise NotRead(f"tensors of type {type(odd).__name__} are not looked into")
    if weight is None or weight.is_meta or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise NotRead(f"the weight of {known.head_name} is not whole here")
    fits = labels.shape == hidden.shape[:-1] and not labels.is_floating_point()
    rows, targets = choose_tokens(
        hidden, shifted(labels.detach().to(hidden.device), 1, -100) if fits else None, tokens=tokens
    )
    config = getattr(known.model, "config", None)
    return LossCall(
        known.name,
        targets=None if targets is None else targets.to(weight.device),
        hidden=rows.to(weight.device),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        head=known.head_name,
        scale=scale_of(lambda name: getattr(config, name, None)),
        softcap=softcap_of(lambda name: getattr(config, name, None)),
    )
