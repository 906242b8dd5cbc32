"""Which of our signals a number in somebody else's log is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from traindiag.playback.series import LEARNING_RATE
from traindiag.record.catalogue import BY_NAME, check_signal, near

GUESSES: Mapping[str, tuple[str, ...]] = {
    "loss/value": (
        "loss",
        "train_loss",
        "training_loss",
        "loss_train",
        "train_loss_step",
        "loss_step",
        "lm_loss",
        "lm_loss_training_lm_loss",
        "train_crossentropyloss",
        "train_ce_loss",
        "train_cross_entropy",
    ),
    "gradient/norm": (
        "grad_norm",
        "gradient_norm",
        "train_grad_norm",
        "train_gradient_norm",
        "train_grad_norm_step",
        "grad_norm_step",
        "grad_norm_grad_norm",
        "total_grad_norm",
        "optim_total_grad_norm",
        "grad_2_0_norm_total",
        "grad_norm_total",
        "l2_norm_grad_global",
        "gradnorm",
    ),
    LEARNING_RATE: ("lr", "learning_rate", "train_lr", "train_learning_rate", "learning_rate_learning_rate"),
}
"""Usual names, in lower case with one underscore for whatever else there is; the first one that a log has is taken.
They are those of the Hugging Face Trainer, Lightning, Megatron, OLMo and Composer."""

STEP_NAMES = (
    "train_global_step",
    "trainer_global_step",
    "global_step",
    "step",
    "iteration",
    "iter",
    "steps",
    "update",
    "num_updates",
)
"""Usual names of a column of steps, written in the same way, best first: a logger's own ``_step`` counts its rows."""


@dataclass(frozen=True)
class Name:
    """What a name was taken for.

    Args:
        foreign: As the log has it.
        signal: Our signal, ``learning_rate``, or ``logged/<name>``.
        why: Who decided so.
    """

    foreign: str
    signal: str
    why: Literal["given", "guessed", "ours", "unknown"]


def name_signals(names: Iterable[str], given: Mapping[str, str] | None = None) -> list[Name]:
    """What each name is, in the order of ``names``.

    Args:
        names: Names of the log.
        given: Signals by name, where the user knows better.

    Raises:
        ValueError: If a given name or signal does not exist, with near ones.

    Example:
        >>> [n.signal for n in name_signals(["train/loss", "val_loss", "lr-AdamW", "kl"], {"kl": "reward/kl"})]
        ['loss/value', 'logged/val_loss', 'learning_rate', 'reward/kl']
    """
    names, given = list(names), dict(given or {})
    for foreign, signal in given.items():
        if foreign not in names:
            raise ValueError(f"the log has no {foreign!r}.{near(foreign, names)} It has {', '.join(names)}")
        if signal != LEARNING_RATE:
            check_signal(signal, [LEARNING_RATE])
    twice = sorted({s for s in given.values() if list(given.values()).count(s) > 1})
    if twice:
        raise ValueError(
            f"{twice[0]} is given to several names: {', '.join(n for n in given if given[n] == twice[0])}"
        )
    taken = {signal: (foreign, "given") for foreign, signal in given.items()}
    for name in names:
        if name in BY_NAME and name not in taken and name not in given:
            taken[name] = name, "ours"
    spelt: dict[str, list[str]] = {}
    for name in names:
        if name not in given and name not in BY_NAME:
            spelt.setdefault(_spelling(name), []).append(name)
    for signal, usual in GUESSES.items():
        found = next((spelt[word][0] for word in usual if word in spelt), None)
        if found is not None and signal not in taken:
            taken[signal] = found, "guessed"
    of = {foreign: (signal, why) for signal, (foreign, why) in taken.items()}
    return [Name(n, *of.get(n, (f"logged/{n.strip('/')}", "unknown"))) for n in names]  # type: ignore[arg-type]


def step_columns(names: Iterable[str]) -> list[str]:
    """Those of the names that are of steps, the best first.

    Example:
        >>> step_columns(["_step", "loss", "trainer/global_step"])
        ['trainer/global_step', '_step']
    """
    return sorted((n for n in names if _plain(n) in STEP_NAMES), key=lambda n: STEP_NAMES.index(_plain(n)))


def _spelling(name: str) -> str:
    # Lightning's LearningRateMonitor writes lr-<optimizer>, Megatron a second tag for each against samples.
    return "lr" if re.fullmatch(r"lr-[A-Za-z]+", name) else _plain(name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
