"""Recognises cross-entropy among the calls of a training step, and turns each into a :class:`LossCall`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from traindiag.capture import torch_private
from traindiag.capture.fused import HeadOf, NotRead, loss_of, read_function
from traindiag.capture.taps import LossCall

_LINEAR = getattr(F, "linear_cross_entropy", None)
_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax})
_NLL = torch_private.NLL_KERNELS | {F.nll_loss}
_CROSS_ENTROPY = torch_private.CROSS_ENTROPY_KERNELS | {F.cross_entropy}
LOSS_FUNCTIONS = _LOG_SOFTMAX | _NLL | _CROSS_ENTROPY | ({_LINEAR} if _LINEAR else set())
BACKWARD = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})

_KERNEL_ARGUMENTS = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")
_ARGUMENTS = ("input", "target", "weight", "size_average", "ignore_index")
_LINEAR_ARGUMENTS = ("input", "linear_weight", "target")

_NOT_THE_PROGRAM = ("torch", "traindiag.capture")
_KEPT = 2

Told = Callable[[LossCall], None]
Refused = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a loss is computed.

    Args:
        module: Name of the innermost watched module that runs; empty outside of all.
        forward: Code of that module's forward method where it has to be seen to be running, because wrappers also
            call a whole model to run another of its methods; None otherwise.
    """

    module: str = ""
    forward: CodeType | None = None


class Losses:
    """Reads losses and names their call sites.

    A site is named by the module or, outside of all modules, by the innermost function of the program. Further
    calls in the same function are numbered in the order in which they first occur. The numbers stay for the run.
    """

    def __init__(self, tell: Told, refuse: Refused) -> None:
        self._told_by, self._refused_by = tell, refuse
        self._numbers: dict[str, dict[tuple[CodeType, int] | None, int]] = {}
        self._log_softmaxes: list[_LogSoftmax] = []
        self._held: list[tuple[str, str]] | None = None
        self.told = 0

    def forget(self) -> None:
        """Lets go of logits that no loss has asked for: backward is about to need the memory."""
        self._log_softmaxes.clear()

    def run(
        self,
        place: Place,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        trains: bool = False,
    ) -> Any:
        """Calls ``function``, one of :data:`LOSS_FUNCTIONS`, unchanged and looks at what went in.

        Args:
            place: Where it is called.
            function: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
            trains: Whether the call is known to stand for one that trains, although gradients are off in it.
        """
        output = function(*args, **kwargs)
        if self._held is not None and not torch.is_grad_enabled():
            return output  # a piece of what an autograd function computes, which counts as a whole
        if not isinstance(output, Tensor) or not (trains or _trains(output)):
            return output
        if function in _LOG_SOFTMAX:
            self._remember(output, args[0] if args else kwargs.get("input", kwargs.get("self")))
            return output
        site = self._site(place)
        try:
            call = self._read(site, function, args, kwargs)
        except Exception as error:  # a surprise in our reading of a call must not end a run
            self._refuse(site, f"this call was not understood: {type(error).__name__}: {error}")
            return output
        if call is not None:
            with torch.no_grad():
                self._tell(call)
        return output

    def run_function(
        self,
        place: Place,
        function: type,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        apply: Callable[..., Any],
        head_of: HeadOf,
        *,
        trains: bool = False,
    ) -> Any:
        """Calls an autograd function unchanged and looks whether it is a loss that never builds logits.

        A loss that was seen inside of it, as where its pieces are computed by torch's cross-entropy, counts instead.

        Args:
            place: Where it is called.
            function: Its class.
            args: Its arguments.
            kwargs: Its keyword arguments.
            apply: What to call.
            head_of: Name of the module whose weight a tensor is, or None.
            trains: Whether the call is known to stand for one that trains, although gradients are off in it.
        """
        before, outer, self._held = self.told, self._held, []
        try:
            output = apply(*args, **kwargs)
        finally:
            held, self._held = self._held, outer
        loss = loss_of(output)
        found = False
        if loss is not None and self.told == before and (trains or _trains(loss)):
            with torch_private.without_modes(), torch.no_grad():
                found = self._look_at_function(place, function, args, kwargs, loss, head_of)
        for site, reason in () if found else held or ():
            self._refuse(site, reason)
        return output

    def _look_at_function(
        self,
        place: Place,
        function: type,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Tensor,
        head_of: HeadOf,
    ) -> bool:
        try:
            call = read_function("", function, args, kwargs, loss, head_of)
        except NotRead as why:
            self._refuse(self._site(place), str(why))
            return True
        except Exception:  # a surprise in our reading of somebody's function, which may well be no loss
            return False
        if call is not None:
            self._tell(replace(call, site=self._site(place)))
        return call is not None

    def _tell(self, call: LossCall) -> None:
        self.told += 1
        self._told_by(call)

    def _refuse(self, site: str, reason: str) -> None:
        if self._held is None:
            self._refused_by(site, reason)
        else:
            self._held.append((site, reason))

    def _site(self, place: Place) -> str:
        running = [(code, at) for code, at in torch_private.running_code(_NOT_THE_PROGRAM) if _is_named(code)]
        name = place.module
        if not name or (place.forward is not None and all(code is not place.forward for code, _ in running)):
            name = running[0][0].co_name.replace("<module>", "script") if running else "script"
        numbers = self._numbers.setdefault(name, {})
        number = numbers.setdefault(running[0] if running else None, len(numbers) + 1)
        return name if number == 1 else f"{name}#{number}"

    def _read(
        self, site: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> LossCall | None:
        if function is _LINEAR:
            return self._linear(site, {**dict(zip(_LINEAR_ARGUMENTS, args)), **kwargs})
        public = function in (F.cross_entropy, F.nll_loss)
        given = {**dict(zip(_ARGUMENTS if public else _KERNEL_ARGUMENTS, args)), **kwargs}
        told, target = given["input"] if "input" in given else given["self"], given["target"]
        if not self._is_plain(site, told, target):
            return None
        logits: Tensor | None = told if function in _CROSS_ENTROPY else self._before_log_softmax(told)
        if logits is None:
            self._refuse(site, "nll_loss of numbers that no log_softmax was seen to make")
            return None
        logits = logits.detach()
        if logits.ndim > 1:
            logits = logits.movedim(1, -1)
        return _call(site, target, given, logits=logits)

    def _linear(self, site: str, given: Mapping[str, Any]) -> LossCall | None:
        hidden, weight, target = given["input"], given["linear_weight"], given["target"]
        bias = given.get("linear_bias")
        if not self._is_plain(site, hidden, target, weight, bias):
            return None
        if weight.ndim != 2:
            self._refuse(site, "linear_cross_entropy with more than one loss a token")
            return None
        bias = None if bias is None else bias.detach()
        return _call(site, target, given, hidden=hidden.detach(), weight=weight.detach(), bias=bias)

    def _is_plain(self, site: str, *tensors: Tensor | None) -> bool:
        odd = next((t for t in tensors if t is not None and not torch_private.is_plain(t)), None)
        if odd is not None:
            self._refuse(site, f"tensors of type {type(odd).__name__} are not looked into")
        return odd is None

    # -- log_softmax, then nll_loss ------------------------------------------------------------

    def _remember(self, output: object, logits: object) -> None:
        """Holds the logits until the loss comes, as the program itself mostly does."""
        if isinstance(output, Tensor) and isinstance(logits, Tensor) and torch_private.is_plain(logits):
            self._log_softmaxes.append(_LogSoftmax(output, logits.detach(), logits._version))
            del self._log_softmaxes[:-_KEPT]

    def _before_log_softmax(self, told: Tensor) -> Tensor | None:
        for known in reversed(self._log_softmaxes):
            if told is known.output or told._base is known.output:
                self._log_softmaxes.remove(known)
                return known.seen_as(told)
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _LogSoftmax:
    output: Tensor
    logits: Tensor
    version: int

    def seen_as(self, told: Tensor) -> Tensor | None:
        """The logits under the view that ``told`` is of the output; None where they have changed since."""
        if self.logits._version != self.version:
            return None
        if told is self.output:
            return self.logits
        if self.logits.stride() != self.output.stride():
            return None
        offset = self.logits.storage_offset() + told.storage_offset() - self.output.storage_offset()
        return self.logits.as_strided(told.shape, told.stride(), offset)


def _call(site: str, target: Tensor, given: Mapping[str, Any], **found: Any) -> LossCall:
    ignore_index = given.get("ignore_index")
    return LossCall(
        site,
        targets=None if target.is_floating_point() else target.detach(),
        ignore_index=-100 if ignore_index is None else ignore_index,
        **found,
    )


def _trains(loss: Tensor) -> bool:
    """Not evaluation, a teacher's loss, or a number to be logged."""
    if torch.is_grad_enabled():
        return loss.requires_grad
    return torch_private.in_reentrant_checkpoint()


def _is_named(code: CodeType) -> bool:
    """Not a lambda or a comprehension, which belong to the function around them, nor a mode that hands calls on."""
    return code.co_name == "<module>" or not code.co_name.startswith(("<", "__torch_function__"))
