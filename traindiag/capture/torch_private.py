"""Every use of private torch names in capture, in one place; each is tried on the installed torch by the tests."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

_LOGSUMEXP = ("_saved_logsumexp", "_saved_log_sumexp", "_saved_softmax_logsumexp")
"""As the backward nodes of the flash and cuDNN, memory-efficient, and variable-length kernels call it."""


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


def compiled_wrappers() -> list[nn.Module]:
    """Every ``torch.compile(module)`` alive. A model does not know that it was wrapped, and the wrapper warns its
    user when global module hooks are on; the search takes some ten milliseconds, once.
    """
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is None:
        return []
    return [o for o in gc.get_objects() if type(o) is eval_frame.OptimizedModule]


def remove_mode(mode: TorchFunctionMode) -> int | None:
    """Takes ``mode`` off the stack, wherever it is, and returns its depth; None if it was not there."""
    above: list[Any] = []
    depth: int | None = None
    while depth is None and torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        if top is mode:
            depth = torch._C._len_torch_function_stack()
        else:
            above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)
    return depth


def insert_mode(mode: TorchFunctionMode, depth: int | None) -> None:
    """Puts ``mode`` on the stack at ``depth``; on top where that is None or no longer exists.

    A mode that the program entered after ours must stay above it: its ``with`` block will pop the top of the stack.
    """
    above: list[Any] = []
    while depth is not None and torch._C._len_torch_function_stack() > depth:
        above.append(torch._C._pop_torch_function_stack())
    torch._C._push_on_torch_function_stack(mode)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)
