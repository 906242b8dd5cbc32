"""The demo as its user sees it: what is about to run, the run itself, and the story at the end."""

from __future__ import annotations

import shlex
from pathlib import Path

import rich
from rich.markup import escape
from rich.table import Table

from traindiag.demo.band import Band
from traindiag.demo.run import Settings, train
from traindiag.demo.story import Story
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
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, sentence in story.lines():
        table.add_row(label, escape(sentence))
    table.add_row("took", f"{outcome.seconds:.0f} s")
    console.rule("What happened", align="left")
    console.print(table, highlight=False)
    command = f"tensorboard --logdir {shlex.quote(str(outcome.log_dir))}"
    console.print(f"\nOpen the panels:  [bold]{escape(command)}[/]", highlight=False, soft_wrap=True)
    return story
