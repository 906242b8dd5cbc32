"""How well a module can still be trained: by training copies of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from traindiag.capture.hidden_layers import value_heads
from traindiag.capture.stored_states import Call, StoredStates, batch_size

TARGETS = 3
STEPS = 300
"""Sets of random targets and steps on each; the full measure of arXiv 2303.01486 takes ten sets and 2,000 steps."""

BATCH = 256
LEARNING_RATE = 1e-3
"""Adam's default; both copies are trained with it."""


def trainability(
    module: nn.Module, first: Mapping[str, Tensor], states: StoredStates, *, steps: int, seed: int = 0
) -> Tensor | None:
    """Loss on random targets that the weights of now reach against the one that the first weights reach, 0-d.

    Targets are ``a + sin u``, with a random angle ``u`` for each state and output and ``a`` the mean output of the
    copy that is trained, as in Lyle et al. 2023, arXiv 2303.01486; there ``u`` is 1e5 times the output of a random
    network, which is as good as random. Copies are tensors beside the module, so nothing of the run changes.

    Args:
        module: In evaluation mode, in a sandbox.
        first: Its first parameters by name.
        states: What to train on.
        steps: Optimizer steps for each copy and set of targets.
        seed: Of targets and batches.

    Returns:
        Above 1 where the weights of now learn less; None where the module has no output for each state.
    """
    now = {name: p.detach() for name, p in module.named_parameters()}
    device = next(iter(now.values())).device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        losses = []
        for parameters in (now, {name: p.to(device) for name, p in first.items()}):
            found = [_fit(module, parameters, states, steps, seed + k) for k in range(TARGETS)]
            if any(loss is None for loss in found):
                return None
            losses.append(torch.stack([loss for loss in found if loss is not None]))
    return (losses[0] / losses[1]).mean()


def _fit(
    module: nn.Module, parameters: Mapping[str, Tensor], states: StoredStates, steps: int, seed: int
) -> Tensor | None:
    copy = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        batches = list(states.batches(BATCH))
        outputs = [_outputs(module, copy, call) for call in batches]
        if any(not out.numel() for out in outputs):
            return None
        mean = torch.cat(outputs).mean()
        targets = [
            mean + torch.sin(2 * torch.pi * torch.rand(out.shape, generator=generator)).to(out) for out in outputs
        ]
    optimizer = torch.optim.Adam(list(copy.values()), lr=LEARNING_RATE)
    for step in range(steps):
        at = step % len(batches)
        loss = (_outputs(module, copy, batches[at]) - targets[at]).square().mean()
        gradients = torch.autograd.grad(loss, list(copy.values()), allow_unused=True)
        for p, gradient in zip(copy.values(), gradients):
            p.grad = gradient
        optimizer.step()
    with torch.no_grad():
        left = [(_outputs(module, copy, c) - t).square().flatten() for c, t in zip(batches, targets)]
    return torch.cat(left).mean()


def _outputs(module: nn.Module, parameters: Mapping[str, Tensor], call: Call) -> Tensor:
    """``[states, outputs]``; with a graph where there are gradients."""
    args, kwargs = call
    heads = value_heads(torch.func.functional_call(module, dict(parameters), args, kwargs), batch_size(call))
    return torch.cat(heads, 1) if heads else torch.empty(0)
