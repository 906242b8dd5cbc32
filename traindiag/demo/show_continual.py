"""The continual demo as its user sees it: the runs, the story of each, and what replay has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich
from rich import box
from rich.table import Table

from traindiag.demo.continual import TASK, Phases, stability_gap, train
from traindiag.demo.continual_story import HEADINGS, Story
from traindiag.demo.telling import say_how_to_look, tell
from traindiag.lightning import TrainingDiagnostics


def show(replays: Sequence[float], seed: int, log_root: Path) -> list[Story]:
    """Trains once for each share of replay, prints the stories and how to open the panels."""
    console = rich.get_console()  # the one that the progress bar writes to, so that neither tears the other
    first = Phases(replays[0], seed=seed)
    console.print(
        f"[bold]traindiag demo continual[/]: a Transformer of 2 layers and width 64 reads English documentation for "
        f"{first.english} steps and then the source of Python's standard library for {first.python}, its learning "
        "rate back at the peak. Nobody says when."
    )
    stories = []
    for replay in replays:
        phases = Phases(replay, seed=seed)
        monitor = stability_gap(phases)
        diagnostics = TrainingDiagnostics(monitors=[monitor])
        folder = log_root / f"continual-replay-{replay:g}"
        outcome = train(phases, [diagnostics], folder)
        story = Story.of(outcome, diagnostics.alerts, diagnostics.history, monitor.continual.gaps.get(TASK))
        stories.append(story)
        tell(console, f"What happened with {replay:.0%} of English kept", story.lines(), outcome.seconds)
    if len(stories) > 1:
        comparison = Table(*HEADINGS, box=box.HORIZONTALS)
        for story in stories:
            comparison.add_row(*story.row())
        console.rule("Side by side", align="left")
        console.print(comparison, highlight=False)
        console.print(
            "The training loss tells none of this: only English, looked at again and again, does.",
            highlight=False,
        )
    where = stories[0].outcome.log_dir if len(stories) == 1 else log_root
    say_how_to_look(console, where)
    return stories
