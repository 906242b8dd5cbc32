"""Where a loop that is not ours enters its models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def at_entrances(
    models: Sequence[nn.Module],
    trained: Collection[int],
    *,
    begin: Callable[[nn.Module], None],
    close: Callable[[], None],
    ignore: Callable[[], bool],
) -> list[RemovableHandle]:
    """Listens to calls of models and, where the loop never calls the model itself, of their trained parts: policies
    are often containers whose networks are called one by one.

    Args:
        models: The models.
        trained: ``id`` of the parameters that are being trained.
        begin: Told of the module of every training call before it runs.
        close: Called before every other call, and after one that raised.
        ignore: Whether a call is one of our own.

    Returns:
        Handles that remove the hooks.
    """

    def listen(entrance: nn.Module, parts: Sequence[RemovableHandle] = ()) -> list[RemovableHandle]:
        def before_forward(module: nn.Module, _: object) -> None:
            if ignore():
                return
            if module.training and torch.is_grad_enabled():
                for handle in parts:  # not needed any more, and a part in evaluation mode would end its window
                    handle.remove()
                begin(module)
            else:
                close()

        def after_forward(module: nn.Module, _: object, output: object) -> None:
            if output is None and not ignore():  # None: it raised; otherwise the loss is still to come
                close()

        return [
            entrance.register_forward_pre_hook(before_forward),
            entrance.register_forward_hook(after_forward, always_call=True),
        ]

    found: list[RemovableHandle] = []
    for model in models:
        parts = [c for c in model.children() if any(id(p) in trained for p in c.parameters())]
        handles = [handle for part in parts for handle in listen(part)]
        found += handles + listen(model, handles)
    return found
