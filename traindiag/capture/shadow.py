"""A look into compiled code: it runs once more, eagerly, on a few rows of its batch, in a sandbox.

Hooks and modes around compiled code would recompile it, and probes inside change what is fused. A second, eager pass
leaves the compiled one alone: not a bit of the run changes, and no graph is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from traindiag.capture.sandbox import sandbox

ROWS = 2
"""Items of the batch that are looked at: enough for maxima that are spread over all items, for little time."""

_UNCHANGING = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

Before = Callable[[tuple[Any, ...], dict[str, Any]], None]


def intercept(module: nn.Module, before: Before) -> Callable[[], None]:
    """Has ``before`` called with the arguments of every call of a compiled module, outside of its compiled code.

    Args:
        module: The result of ``torch.compile(module)``, or a module whose ``compile()`` was called.
        before: What it returns is ignored.

    Returns:
        A function that takes it back.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(args, kwargs)

        handle: RemovableHandle = module.register_forward_pre_hook(hook, with_kwargs=True)
        return handle.remove

    def watched(*args: Any, **kwargs: Any) -> Any:  # hooks of such a module are part of its compiled code
        before(args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = watched

    def restore() -> None:
        module._compiled_call_impl = compiled

    return restore


def run_again(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Runs ``module`` eagerly on the first rows of its batch; on the whole batch where it does not take a part.

    Raises:
        TypeError: If it is given objects that a second pass might change, such as a cache.
        Exception: What the module raises.
    """
    odd = next((a for a in _leaves((args, kwargs)) if not isinstance(a, _UNCHANGING)), None)
    if odd is not None:
        raise TypeError(f"a second pass might change its argument of type {type(odd).__name__}")
    eager = getattr(module, "_orig_mod", module)
    with sandbox([module]), torch.compiler.set_stance("force_eager"):
        batch = next((len(a) for a in _leaves((args, kwargs)) if isinstance(a, Tensor) and a.ndim), 0)
        if batch > ROWS:
            try:
                eager._call_impl(*_first_rows(args, batch), **_first_rows(dict(kwargs), batch))
                return
            except Exception:  # a module that needs all of the batch
                pass
        eager._call_impl(*args, **kwargs)


def _leaves(argument: Any) -> Iterator[Any]:
    if isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _leaves(part)
    elif isinstance(argument, dict):
        yield from _leaves(list(argument.values()))
    else:
        yield argument


def _first_rows(argument: Any, batch: int) -> Any:
    if type(argument) is Tensor:
        return argument[:ROWS] if argument.ndim and len(argument) == batch else argument
    if type(argument) in (tuple, list):
        return type(argument)(_first_rows(a, batch) for a in argument)
    if type(argument) is dict:
        return {key: _first_rows(a, batch) for key, a in argument.items()}
    return argument
