"""What the callback costs: the step time with it against without it, inside one and the same run.

The run alternates between windows with the callback and without it, each several sampling cadences long. A ratio
compares a window with the mean of its two neighbours. Their mean is what a run pays; median and quartiles show how
even it is, and the same measurement with nothing to measure (``control``) how much of it is noise. Everything
is on as it comes: all families, default rules, a TensorBoard log.

    python -m benchmarks.overhead            # writes benchmarks/results/overhead.json, about 15 minutes
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import machine
from traindiag import TrainingDiagnostics
from traindiag.demo.data import Windows, standard_library
from traindiag.demo.model import GPT, GPTConfig, next_token_loss
from traindiag.engine.settings import Settings

RESULT = Path(__file__).parent / "results" / "overhead.json"
SKIPPED = 4  # windows of warm-up: allocator, caches, the first sample with its layout, back-off


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to train, and how.

    Args:
        config: Its shape.
        batch: Sequences a step.
        window: Steps of a window.
        windows: Windows of a variant.
    """

    config: GPTConfig
    batch: int
    window: int
    windows: int


SUBJECTS = {
    "demo: 3 layers, width 64, context 128, batch 16": Subject(
        GPTConfig(layers=3, width=64, heads=4, context=128), batch=16, window=40, windows=26
    ),
    "6 layers, width 256, context 256, batch 8": Subject(
        GPTConfig(layers=6, width=256, heads=8, context=256), batch=8, window=20, windows=14
    ),
}
FAMILIES = sorted({m.family for m in Settings().build_monitors()})
FIXED = {"max_overhead": None}  # every tenth step, whatever it costs
VARIANTS: dict[str, dict[str, Any] | None] = {
    "control": None,
    "as it comes": {},
    "every 10th step": FIXED,
    "every step": {**FIXED, "every_n_steps": 1},
    "exact attention": {**FIXED, "exact": True},
}
ALONE = {f"{f} alone": {**FIXED, "exclude": [o for o in FAMILIES if o != f]} for f in FAMILIES}
LARGE = ("control", "as it comes", "every 10th step")  # of the slower model


class Model(LightningModule):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.model = GPT(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return next_token_loss(self.model(inputs), targets)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Alternate(Callback):
    """Passes the hooks on to the diagnostics in every other window, and times all windows."""

    def __init__(self, diagnostics: TrainingDiagnostics | None, window: int) -> None:
        self.diagnostics = diagnostics
        self.window = window
        self.seconds: list[float] = []
        self._on = False
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass("on_train_start", trainer, pl_module, always=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.window == 0:
            now = time.perf_counter()
            if batch_idx:
                self.seconds.append(now - self._start)
            self._on = (batch_idx // self.window) % 2 == 1
            self._start = time.perf_counter()
        self._pass("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, *args: Any) -> None:
        self._pass("on_before_backward", *args)

    def on_after_backward(self, *args: Any) -> None:
        self._pass("on_after_backward", *args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._pass("on_before_optimizer_step", *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._pass("on_train_batch_end", *args)

    def on_train_end(self, *args: Any) -> None:
        self._pass("on_train_end", *args, always=True)

    def _pass(self, hook: str, *args: Any, always: bool = False) -> None:
        if self.diagnostics is not None and (self._on or always):
            getattr(self.diagnostics, hook)(*args)

    def ratios(self) -> list[float]:
        """One ratio for each window with diagnostics that has a neighbour without on both sides."""
        s = self.seconds
        return [2 * s[i] / (s[i - 1] + s[i + 1]) for i in range(1 + SKIPPED, len(s) - 1) if i % 2 == 1]


def measure(subject: Subject, settings: dict[str, Any] | None, text: Tensor, folder: str) -> list[float]:
    """Ratios of one run."""
    seed_everything(0, verbose=False)
    diagnostics = None if settings is None else TrainingDiagnostics(**{"terminal": False, **settings})
    alternate = Alternate(diagnostics, subject.window)
    steps = subject.windows * subject.window
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + 1,
        callbacks=[alternate],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Windows(text, (steps + 1) * subject.batch, subject.config.context, seed=0)
    trainer.fit(Model(subject.config), DataLoader(data, batch_size=subject.batch))
    return alternate.ratios()


def summary(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "mean": round(statistics.mean(ratios), 4),
        "error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4),
        "median": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "windows": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="rounds over all variants")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, _ = standard_library()
    results: dict[str, Any] = {}
    for name, subject in SUBJECTS.items():
        variants = VARIANTS | ALONE if not results else {v: VARIANTS[v] for v in LARGE}
        # rounds take turns, so that a slow minute of the machine falls on all variants alike
        ratios: dict[str, list[float]] = {variant: [] for variant in variants}
        for done in range(arguments.rounds):
            for variant, settings in variants.items():
                with tempfile.TemporaryDirectory() as folder:
                    ratios[variant] += measure(subject, settings, text, folder)
            print(f"{name}: round {done + 1} of {arguments.rounds}", flush=True)
        results[name] = {variant: summary(values) for variant, values in ratios.items()}
        for variant, found in results[name].items():
            print(f"  {variant:18} {found['mean']:.3f} +- {found['error']:.3f}  (median {found['median']:.3f})")
        arguments.output.parent.mkdir(exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
