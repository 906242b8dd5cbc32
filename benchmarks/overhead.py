"""What the callback costs: the step time with it against without it, inside one and the same run.

The run alternates between windows with the callback and windows without it, each as long as the sampling cadence, so
that every window with it holds exactly one sample. A ratio compares a window with the mean of its two neighbours; the
median over windows is reported with its quartiles, and next to it the same measurement with nothing to measure
(``control``), which shows how much of the result is noise.

    python -m benchmarks.overhead            # writes benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.machine import machine
from traindiag import TrainingDiagnostics
from traindiag.demo.data import Windows, standard_library
from traindiag.demo.model import GPT, GPTConfig, next_token_loss

RESULT = Path(__file__).parent / "results" / "overhead.json"
CADENCE = 10
SKIPPED = 4  # windows of warm-up: allocator, caches, the first sample with its layout
MODELS = {
    "demo: 3 layers, width 64, context 128, batch 16": (GPTConfig(layers=3, width=64, heads=4, context=128), 16),
    "6 layers, width 256, context 256, batch 8": (GPTConfig(layers=6, width=256, heads=8, context=256), 8),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "control": None,
    "default": {},
    "without activations": {"exclude": ["activation"]},
    "fast lane only": {"exclude": ["attention", "activation"]},
    "every step": {"every_n_steps": 1},
    "exact attention": {"exact": True},
}


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

    def __init__(self, diagnostics: TrainingDiagnostics | None) -> None:
        self.diagnostics = diagnostics
        self.seconds: list[float] = []
        self._on = False
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pass("on_train_start", trainer, pl_module, always=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % CADENCE == 0:
            now = time.perf_counter()
            if batch_idx:
                self.seconds.append(now - self._start)
            self._on = (batch_idx // CADENCE) % 2 == 1
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


def measure(
    config: GPTConfig, batch: int, settings: dict[str, Any] | None, windows: int, text: Tensor
) -> list[float]:
    seed_everything(0, verbose=False)
    diagnostics = None
    if settings is not None:
        diagnostics = TrainingDiagnostics(**{"terminal": False, "max_overhead": None, **settings})
    alternate = Alternate(diagnostics)
    steps = windows * CADENCE
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps + 1,
        callbacks=[alternate],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Windows(text, (steps + 1) * batch, config.context, seed=0)
    trainer.fit(Model(config), DataLoader(data, batch_size=batch))
    return alternate.ratios()


def summary(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "windows": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=200, help="windows of 10 steps for each model and variant")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, _ = standard_library()
    results: dict[str, Any] = {}
    for model, (config, batch) in MODELS.items():
        # rounds take turns, so that a slow minute of the machine falls on all variants alike
        ratios: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        rounds = max(1, arguments.windows // 40)
        for done in range(rounds):
            for variant, settings in VARIANTS.items():
                ratios[variant] += measure(config, batch, settings, arguments.windows // rounds, text)
            print(f"{model}: round {done + 1} of {rounds}", flush=True)
        results[model] = {variant: summary(values) for variant, values in ratios.items()}
        for variant, values in results[model].items():
            print(f"  {variant:16} {values['ratio']:.3f}  ({values['low']:.3f} to {values['high']:.3f})")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
