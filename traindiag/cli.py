"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import traindiag
from traindiag.record.catalogue import SIGNALS
from traindiag.record.signal import Signal

app = typer.Typer(
    help="Early warnings of unstable training, for PyTorch and Lightning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"traindiag {traindiag.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Early warnings of unstable training, for PyTorch and Lightning."""


@app.command()
def signals(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table that the README shows.")] = False,
) -> None:
    """List every built-in signal: what it measures, how, and where it comes from."""
    if markdown:
        typer.echo(signals_markdown(SIGNALS))
    else:
        Console().print(signals_table(SIGNALS))


@app.command()
def demo(
    healthy: Annotated[bool, typer.Option("--healthy", help="Train the same model well; it stays silent.")] = False,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Peak learning rate [default: too high].")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 3,
    width: Annotated[int, typer.Option(min=16, help="Size of the residual stream, a multiple of 16.")] = 64,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="LayerNorm on queries and keys.")] = False,
    z_loss: Annotated[float, typer.Option(min=0.0, help="Weight of the z-loss, 1e-4 is usual.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the data.")] = 0,
    log_dir: Annotated[Path, typer.Option(help="Where a folder for this run is made.")] = Path("traindiag-demo"),
) -> None:
    """Train a small Transformer on Python's own source at too high a learning rate, and be warned."""
    if healthy and lr is not None:
        raise typer.BadParameter("--healthy chooses the learning rate itself; leave out --lr or --healthy")
    from traindiag.demo.run import HEALTHY_LR, UNSTABLE_LR, Settings
    from traindiag.demo.show import show

    try:
        settings = Settings(
            lr=lr if lr is not None else HEALTHY_LR if healthy else UNSTABLE_LR,
            steps=steps,
            layers=layers,
            width=width,
            qk_norm=qk_norm,
            z_loss=z_loss,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    show(settings, log_dir)


def signals_table(rows: Iterable[Signal]) -> Table:
    """One row a signal for the terminal: name and cells on the left, meaning, formula and source on the right."""
    table = Table(box=box.HORIZONTALS, show_header=False, show_lines=True, padding=(0, 3, 0, 0), border_style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for signal in rows:
        unit = "" if signal.unit == "1" else f", in {signal.unit}"
        table.add_row(
            Text.assemble((signal.name, "bold"), f"\nper {_per(signal)}\n{_sampled(signal)}"),
            Text.assemble(
                f"{signal.summary}{unit}\n", (f"{signal.formula}\n", "cyan"), (signal.source, "dim italic")
            ),
        )
    return table


def signals_markdown(rows: Iterable[Signal]) -> str:
    r"""The same as a Markdown table.

    Example:
        >>> print(signals_markdown([Signal("a/b", ("layer",), "size", formula="|x|", unit="nat", source="paper")]))
        | signal | per | sampled | what it is | formula | unit | source |
        |---|---|---|---|---|---|---|
        | `a/b` | layer | at the cadence | size | `\|x\|` | nat | paper |
    """
    lines = ["| signal | per | sampled | what it is | formula | unit | source |", "|---|---|---|---|---|---|---|"]
    for s in rows:
        cells = (
            f"`{s.name}`", _per(s), _sampled(s), s.summary, f"`{s.formula}`", s.unit, s.source
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _per(signal: Signal) -> str:
    return ", ".join(signal.axes) or "step"


def _sampled(signal: Signal) -> str:
    return "every step" if signal.lane == "fast" else "at the cadence"
