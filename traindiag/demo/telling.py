"""What every demo ends with on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def tell(console: Console, heading: str, lines: Iterable[tuple[str, str]], seconds: float) -> None:
    """The story of one run, and how long it took."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, sentence in lines:
        table.add_row(label, escape(sentence))
    table.add_row("took", f"{seconds:.0f} s")
    console.rule(heading, align="left")
    console.print(table, highlight=False)


def say_how_to_look(console: Console, folder: Path | None) -> None:
    """The command that opens the panels."""
    command = f"tensorboard --logdir {shlex.quote(str(folder))}"
    console.print(f"\nOpen the panels:  [bold]{escape(command)}[/]", highlight=False, soft_wrap=True)
