"""The demo as its user sees it: what is about to run, the run itself, and the story at the end."""

from __future__ import annotations

from pathlib import Path

import rich

from traindiag.demo.band import Band
from traindiag.demo.run import Settings, train
from traindiag.demo.story import Story
from traindiag.demo.telling import say_how_to_look, tell
from traindiag.lightning import TrainingDiagnostics


def show(settings: Settings, log_root: Path) -> Story:
    """Trains with the callback, prints the story and how to open the panels."""
    console = rich.get_console()  # the one that the progress bar writes to, so that neither tears the other
    console.print(
        f"[bold]traindiag demo[/]: a Transformer of {settings.layers} layers and width {settings.width} learns the "
        f"source of Python's standard library, {settings.steps} steps at a peak learning rate of {settings.lr:g}."
    )
    diagnostics = TrainingDiagnostics()
    outcome = train(settings, [diagnostics], log_root)
    story = Story.of(outcome, diagnostics.alerts, Band.load())
    tell(console, "What happened", story.lines(), outcome.seconds)
    say_how_to_look(console, outcome.log_dir)
    return story
