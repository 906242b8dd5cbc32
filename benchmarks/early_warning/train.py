"""Trains one run of the zoo and leaves two things: a log of every signal, and a file with its losses alone."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.early_warning.data import batches
from benchmarks.early_warning.models import build, head_of
from benchmarks.early_warning.zoo import Recipe, Run
from traindiag.engine.diagnostics import Diagnostics

AFTER_NON_FINITE = 20
"""Steps that a run goes on after its first loss that is not finite: none of them can be another."""

OVERFLOW_SCALE = 2.0**26
"""A loss scale at which gradients above 1e-3 leave the range of float16."""

QUIET = 0.01
"""Weight of the loss in the quiet part of a run, such as one whose targets are nearly all masked."""

_MAKES_QUERIES = re.compile(r"query_key_value|q_proj|k_proj|c_attn")


def losses_of(folder: Path, name: str) -> Path:
    """Where the losses of a run are; that the file is there says that the run is complete."""
    return folder / "losses" / f"{name}.json"


def log_of(folder: Path, name: str) -> Path:
    """Where its log is."""
    return folder / "logs" / name


def train(run: Run, folder: Path, *, diagnostics: bool = True, rules: bool = False) -> float:
    """Trains one run and puts its log and its losses in place, in this order and only when it is complete.

    Args:
        run: What to train.
        folder: Where stored runs are.
        diagnostics: Without them there is no log: for measuring what they cost, and for looking for learning rates.
        rules: Whether the default pack judges the run while it is trained. Runs of the zoo are trained without: what
            is measured, and when, must not depend on what is going to be judged by it.

    Returns:
        Seconds.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    part = folder / "part" / run.name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            losses = _losses(run, part / "log" if diagnostics else None, rules)
    finally:
        torch.set_flush_denormal(False)
    seconds = time.perf_counter() - began
    said = sorted({str(n.message) for n in notes if "traindiag" in str(n.message)})
    if said and diagnostics:
        (part / "log" / "notes.txt").write_text("\n".join(said) + "\n")
    (part / "losses.json").write_text(json.dumps(_header(run) | {"losses": losses}))
    if diagnostics:
        log_of(folder, "").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(log_of(folder, run.name), ignore_errors=True)  # of a run that was killed between the two
        os.replace(part / "log", log_of(folder, run.name))
    losses_of(folder, run.name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part / "losses.json", losses_of(folder, run.name))
    shutil.rmtree(part)
    return seconds


def _header(run: Run) -> dict[str, object]:
    return {
        "name": run.name,
        "steps": run.recipe.steps,
        "warmup": run.recipe.warmup,
        "control": run.control,
        "reference": run.reference,
        "kind": run.kind,
        "cure": run.cure,
        "cure_of": run.cure_of,
        "control_is": run.control_is,
        "injected_at": run.recipe.inject_at,
        "split": run.split,
        "row": run.row,
        "configuration": run.configuration,
        "recipe": run.recipe.digest(),
    }


def _losses(run: Run, log: Path | None, rules: bool) -> list[float | None]:
    recipe = run.recipe
    torch.manual_seed(run.seed)
    model = build(recipe).train()
    groups, factors = _groups(model, recipe)
    optimizer = AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), eps=recipe.eps)
    scheduler = LambdaLR(optimizer, factors)
    facts = {"length": recipe.steps, "batch_size": recipe.batch, "warmup": recipe.warmup, "precision": "32-true"}
    if recipe.clip:
        facts["clip"] = ("norm", recipe.clip)
    watch = None
    if log is not None:
        watch = Diagnostics(
            model,
            optimizer,
            log,
            facts=facts,
            schedulers=[scheduler],
            default_rules=rules,
            max_overhead=None,
            layout=False,
            terminal=False,
        )
    losses: list[float | None] = []
    broken = 0
    try:
        for step, (inputs, targets) in enumerate(batches(recipe, run.seed)):
            if watch is not None:
                watch.begin()
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            total = loss
            if recipe.z_loss:
                total = loss + recipe.z_loss * logits.logsumexp(-1).square().mean()
            if step < recipe.quiet * recipe.steps:
                total = QUIET * total
            if recipe.fade != 1:
                total = recipe.fade ** (step / recipe.steps) * total
            if watch is not None:
                watch.loss(loss)
                watch.before_backward()
            total.backward()
            _spoil(recipe, step, model)
            if watch is not None:
                watch.gradients()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            if recipe.update_clip:
                _clip_updates(optimizer, recipe)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if watch is not None:
                watch.end()
            value = loss.item()
            losses.append(float(f"{value:.7g}") if math.isfinite(value) else None)
            broken += bool(broken or losses[-1] is None)
            if broken > AFTER_NON_FINITE:
                break
    finally:  # of an interrupt too: hooks would stay in a process that goes on
        if watch is not None:
            watch.finish()
    return losses


def _groups(model: nn.Module, recipe: Recipe) -> tuple[list[dict[str, object]], list[Callable[[int], float]]]:
    """A group, and its schedule, for all that is trained alike; one a tensor where updates are clipped."""
    head = {id(p) for p in head_of(model).parameters()}
    groups: dict[object, dict[str, object]] = {}
    factors: dict[object, Callable[[int], float]] = {}
    for name, parameter in model.named_parameters():
        part = "output" if id(parameter) in head else "rest"
        if parameter.dim() > 1 and _MAKES_QUERIES.search(name):
            part = "attention"
        peak = recipe.peak_times if recipe.peak_on in ("all", part) else 1.0
        decay = recipe.weight_decay
        if part == "output" and recipe.output_decay is not None:
            decay = recipe.output_decay
        planned = recipe.schedule not in ("ramp", "jump")
        key = name if recipe.update_clip else (peak, decay)
        # a planned learning rate is told to those who ask the optimizer, a ramp or a jump comes unannounced
        groups.setdefault(key, {"params": [], "lr": recipe.lr * (peak if planned else 1), "weight_decay": decay})
        groups[key]["params"].append(parameter)  # type: ignore[attr-defined]
        factors.setdefault(key, schedule(recipe, 1.0 if planned else peak))
    return list(groups.values()), list(factors.values())


def schedule(recipe: Recipe, peak: float) -> Callable[[int], float]:
    """What the learning rate of a group is multiplied by at each step.

    Args:
        recipe: Schedule, warm-up and horizon.
        peak: What a ramp or a jump leads to.
    """

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        if recipe.schedule == "cosine":
            return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        if recipe.schedule == "ramp":
            return float(peak**done)
        if recipe.schedule == "jump":
            return peak if step >= recipe.steps // 2 else 1.0
        return 1.0

    return factor


def _clip_updates(optimizer: AdamW, recipe: Recipe) -> None:
    """Divides the learning rate of a tensor by RMS_t where that is above 1, as arXiv 2304.13013 does."""
    for group in optimizer.param_groups:
        (parameter,) = group["params"]
        state = optimizer.state[parameter]
        if parameter.grad is None or not state:
            continue
        square = parameter.grad.square()
        steps = float(state["step"]) + 1
        second = recipe.beta2 * state["exp_avg_sq"] + (1 - recipe.beta2) * square
        second = (second / (1 - recipe.beta2**steps)).clamp_min(recipe.eps**2)
        group["lr"] /= max(1.0, (square / second).mean().sqrt().item())  # the scheduler writes it anew every step


@torch.no_grad()
def _spoil(recipe: Recipe, step: int, model: nn.Module) -> None:
    """Faults of the arithmetic, in the gradients as they leave the backward pass."""
    if step != recipe.inject_at:
        return
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    if recipe.inject == "nan":
        gradients[len(gradients) // 2].view(-1)[0] = math.nan
    elif recipe.inject == "overflow":
        for gradient in gradients:
            gradient.copy_((gradient * OVERFLOW_SCALE).half().float() / OVERFLOW_SCALE)
