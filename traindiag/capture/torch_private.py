"""Every use of private torch names in capture, in one place; each is tried on the installed torch by the tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

_LOGSUMEXP = ("_saved_logsumexp", "_saved_log_sumexp", "_saved_softmax_logsumexp")
"""As the backward nodes of the flash and cuDNN, memory-efficient, and variable-length kernels call it."""


CROSS_ENTROPY_KERNELS = frozenset({torch._C._nn.cross_entropy_loss})
NLL_KERNELS = frozenset(getattr(torch._C._nn, name) for name in ("nll_loss", "nll_loss2d", "nll_loss_nd"))
"""What the functions of ``torch.nn.functional`` call; some programs call them themselves."""


def in_backward() -> bool:
    """Whether autograd is running, as in the recomputation of a checkpointed block."""
    return bool(torch._C._current_graph_task_id() != -1)


def in_reentrant_checkpoint() -> bool:
    """Whether this is the first pass of a reentrant checkpoint: it trains, although gradients are off in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def running_code(skip: tuple[str, ...]) -> Iterator[tuple[CodeType, int]]:
    """Code and instruction of every function that is running, from the inside, less those of some packages.

    Args:
        skip: Names of modules and packages to leave out.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not any(module == name or module.startswith(f"{name}.") for name in skip):
            yield frame.f_code, frame.f_lasti
        frame = frame.f_back


def saved_logsumexp(output: Tensor) -> Tensor | None:
    """The log-sum-exp that a fused attention kernel kept for its backward pass, if it can be read for nothing.

    Under saved-tensor hooks (non-reentrant checkpoint, offloading) reading would run the hook: a whole forward pass
    of the block in the first case.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    node = output.grad_fn
    for _ in range(3):  # head sizes that the kernel pads end in a slice and perhaps a view
        if node is None:
            return None
        for name in _LOGSUMEXP:
            if hasattr(type(node), name):
                try:
                    found = getattr(node, name)
                except RuntimeError:  # freed, or changed in place
                    return None
                return found.detach() if isinstance(found, Tensor) and found.numel() else None
        if len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether its values can be read here: no DTensor, no fake or nested tensor, not inside vmap or grad."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_flat_shard(parameter: nn.Parameter) -> bool:
    """Whether FSDP1 keeps a slice of it here that is a plain tensor to everyone else."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_compiled(module: nn.Module) -> bool:
    """``torch.compile(module)``, ``module.compile()``, or a compiled method or function kept on the module."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    made = [*vars(module).values(), getattr(type(module), "forward", None)]
    return any("_torchdynamo_orig_callable" in getattr(f, "__dict__", ()) for f in made if callable(f))


def compiled_objects() -> tuple[list[nn.Module], bool]:
    """Every ``torch.compile(module)`` alive, and whether a function compiled by itself is.

    A model does not know that it was wrapped, and the wrapper warns its user when global module hooks are on; a
    compiled function belongs to nobody. The search takes some ten milliseconds, once.
    """
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is None:
        return [], False
    wrapper = eval_frame.OptimizedModule
    made_by = [c for c in eval_frame._TorchDynamoContext.__call__.__code__.co_consts if isinstance(c, CodeType)]
    found = gc.get_referrers(wrapper, *made_by)  # much faster than looking at every object
    return [o for o in found if type(o) is wrapper], any(type(o) is FunctionType for o in found)


AroundFunction = Callable[[type, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]

_AROUND: list[AroundFunction] = []
"""Everyone who looks at calls of autograd functions now; two windows may be open and close in any order."""


def around_functions(around: AroundFunction) -> Callable[[], None]:
    """Has every autograd function called through ``around``, wherever its ``apply`` was taken from before.

    ``Function.apply`` ends in a look-up in its bases, which finds this one first. Graphs of compiled code are not
    touched: Dynamo does not look there.

    Args:
        around: Takes the class, the arguments and what to call with them.

    Returns:
        A function that takes it back.
    """
    base: Any = torch.autograd.function._SingleLevelFunction
    _AROUND.append(around)
    if len(_AROUND) == 1:
        base.apply = _APPLY

    def restore() -> None:
        _AROUND.remove(around)
        if not _AROUND and vars(base).get("apply") is _APPLY:  # else somebody has put another one around it
            del base.apply

    return restore


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    run = super(torch.autograd.function._SingleLevelFunction, cls).apply
    for around in tuple(_AROUND):
        run = partial(_through, around, cls, run)
    return run(*args, **kwargs)


def _through(around: AroundFunction, cls: type, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return around(cls, args, kwargs, run)


_APPLY: Any = classmethod(_apply)


def without_modes() -> AbstractContextManager[None]:
    """Nothing done inside reaches a function mode, ours or the program's."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def set_mode(mode: TorchFunctionMode, on: bool) -> None:
    """Puts ``mode`` on the stack, or takes it off, wherever it is.

    It goes below every mode of the program, because a ``with`` block that ends pops what is on top; only what
    ``torch.set_default_device`` has put there insists on being the lowest of all.
    """
    stack = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    if on == any(other is mode for other in stack):
        return
    wanted = [other for other in stack if other is not mode]
    if on:
        default_device = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
        wanted.insert(1 if wanted and wanted[0] is default_device else 0, mode)
    for _ in stack:
        torch._C._pop_torch_function_stack()
    for other in wanted:
        torch._C._push_on_torch_function_stack(other)
