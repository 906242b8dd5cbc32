"""Trains many runs at a time, and only those that are missing."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.early_warning.zoo import Run


def is_stored(run: Run, folder: Path) -> bool:
    """Whether a run of this name is complete and was trained by this recipe."""
    path = folder / "losses" / f"{run.name}.json"
    return path.exists() and json.loads(path.read_text()).get("recipe") == run.recipe.digest()


def train_all(plan: list[Run], folder: Path, jobs: int, *, log: bool = True) -> int:
    """Trains what is missing, some at a time; gives the number of failures, each of which is printed.

    Args:
        plan: What there is to be.
        folder: Where it is stored.
        jobs: Processes, of one thread each; this one for 1.
        log: Whether signals are measured.
    """
    missing = [run for run in plan if not is_stored(run, folder)]
    print(f"{len(plan)} runs, {len(plan) - len(missing)} of them stored already")
    failures = 0
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} % of steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    pool: Executor = ThreadPoolExecutor(1)
    if jobs > 1:  # spawned: no file descriptors and no torch state are inherited
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with pool, Progress(*columns, speed_estimate_period=300) as progress:
        bar = progress.add_task("training", total=sum(run.recipe.steps for run in missing))
        left = iter(missing)
        under_way: dict[Future[float], Run] = {}
        while True:
            while len(under_way) < 2 * jobs and (run := next(left, None)) is not None:
                under_way[pool.submit(_train, run, folder, log)] = run
            if not under_way:
                return failures
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                if (error := future.exception()) is not None:
                    failures += 1
                    progress.console.print(f"{run.name}: {''.join(traceback.format_exception(error))}", markup=False)
                progress.update(bar, advance=run.recipe.steps, description=run.name)


def _train(run: Run, folder: Path, log: bool) -> float:
    from benchmarks.early_warning.train import train

    return train(run, folder, diagnostics=log)
