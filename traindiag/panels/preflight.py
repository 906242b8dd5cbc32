"""A rehearsal on the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from traindiag.record.cells import Cells, cell_label
from traindiag.record.coverage import Coverage
from traindiag.record.preflight import Preflight
from traindiag.record.series import Series

PLAIN_WIDTH = 100
"""Where there is no terminal to ask; no line is longer than that on a wide one either."""


def print_preflight(result: Preflight, stream: TextIO | None = None) -> None:
    """Prints to ``stream``, by default standard output, in plain text where that is no terminal."""
    out = sys.stdout if stream is None else stream
    console = Console(file=out, highlight=False)
    width = min(console.width, PLAIN_WIDTH) if console.is_terminal else PLAIN_WIDTH
    Console(file=out, highlight=False, width=width).print(preflight_report(result))


def preflight_report(result: Preflight) -> RenderableType:
    """All of it, top to bottom: verdict, findings, growth and cost, what is not seen, first values."""
    faults = sum(f.severity == "warning" for f in result.findings)
    told = Text(f"{faults} fault{'s' * (faults != 1)}", "bold yellow") if faults else Text("no fault", "green")
    head = Text.assemble(("traindiag preflight", "bold"), "  ", told, f"; loss {_number(result.loss)}")
    if result.classes is not None:
        head.append(f", log({result.classes:,} classes) = {math.log(result.classes):.2f}")
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for finding in result.findings:
        style = "bold yellow" if finding.severity == "warning" else "cyan"
        facts.add_row(Text(finding.severity, style), Text(finding.text))
    for what, growth in (("activations", result.activation_growth), ("gradients", result.gradient_growth)):
        for stack, value in growth.items():
            facts.add_row(Text("growth", "dim"), Text(f"{what} over {stack}: {value:+.3f} a block (0 is best)"))
    if result.cost is not None:
        cost = result.cost
        line = f"{cost.share:.1%} of the step time when every {cost.every_n_steps}th step is sampled "
        line += f"({cost.sampled:.0%} of a sampled step, {cost.idle:.1%} of any other; "
        facts.add_row(Text("cost", "dim"), Text(line + f"a step takes {_seconds(cost.seconds_per_step)})"))
    whole = [row for row in result.coverage if row.sight == "exact" and not row.reason]
    if whole:
        seen = ", ".join(f"{row.family} ({len(row.places)})" for row in whole)
        facts.add_row(Text("seen", "green"), Text(seen))
    for row in result.coverage:
        if row not in whole:
            facts.add_row(*_sight(row))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("first values", no_wrap=True)
    for name in ("smallest", "median", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where it is largest", overflow="fold")
    for values in _values(result):
        table.add_row(*values)
    return Group(head, Padding(facts, (0, 0, 1, 2)), Padding(table, (0, 0, 0, 2)))


def _sight(row: Coverage) -> tuple[Text, Text]:
    names = row.places if len(row.places) <= 2 else (row.places[0], f"{len(row.places) - 1} more")
    where = f"{row.family} of {', '.join(names)}" if names else row.family
    label, style = {"exact": ("seen", "green"), "bound": ("in part", "yellow")}.get(row.sight, ("not seen", "yellow"))
    return Text(label, style), Text(f"{where}: {row.reason}")


def _values(result: Preflight) -> Iterator[tuple[str, ...]]:
    for name, series in sorted(result.history.items()):
        if name.startswith("wiring/") or not len(series):
            continue
        first = _first(series)
        if first is not None:
            yield (name, *first)


def _first(series: Series) -> tuple[str, str, str, str] | None:
    """Smallest, median and largest value of the first sample, and where the largest is."""
    seen, values = series.seen[0], series.values[0]
    if not seen.any():
        return None
    there = np.flatnonzero(seen)
    kept = values[there]
    finite = kept[np.isfinite(kept)]
    if finite.size < kept.size:
        at = there[np.flatnonzero(~np.isfinite(kept))[0]]
        return "", "", _number(float(values[at])), _place(series.cells, int(at))
    at = there[int(np.argmax(kept))]
    numbers = [float(np.min(kept)), float(np.median(kept)), float(np.max(kept))]
    if kept.size == 1:
        return "", "", _number(numbers[2]), _place(series.cells, int(at))
    return _number(numbers[0]), _number(numbers[1]), _number(numbers[2]), _place(series.cells, int(at))


def _place(cells: Cells, at: int) -> str:
    """The label of a cell, without the optimizer where there is one only."""
    if cells.axes[:1] == ("optimizer",) and len(cells.axes) > 1 and len({c[0] for c in cells.coordinates}) == 1:
        return cell_label(cells.axes[1:], cells.coordinates[at][1:])
    return cells.label(at)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
