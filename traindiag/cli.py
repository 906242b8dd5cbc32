"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import traindiag
from traindiag.record.catalogue import SIGNALS
from traindiag.record.signal import Signal

if TYPE_CHECKING:
    from traindiag.playback.replay import Replay

if TYPE_CHECKING:
    from traindiag.rules.default_pack import Described
    from traindiag.rules.rule import Rule

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
    """List every built-in signal and every default rule: what they measure and judge, and where that comes from."""
    from traindiag.rules.default_pack import described_rules

    if markdown:
        typer.echo(signals_markdown(SIGNALS))
        return
    console = Console()
    console.print(signals_table(SIGNALS))
    console.print("\nDefault rules", style="bold")
    console.print(rules_table(described_rules()))


demos = typer.Typer(invoke_without_command=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(demos, name="demo")
_DEMO_LOGS = typer.Option(help="Where a folder for this run is made.")


@demos.callback()
def demo(
    context: typer.Context,
    healthy: Annotated[bool, typer.Option("--healthy", help="Train the same model well; it stays silent.")] = False,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Peak learning rate [default: too high].")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 3,
    width: Annotated[int, typer.Option(min=16, help="Size of the residual stream, a multiple of 16.")] = 64,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="LayerNorm on queries and keys.")] = False,
    z_loss: Annotated[float, typer.Option(min=0.0, help="Weight of the z-loss, 1e-4 is usual.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the data.")] = 0,
    log_dir: Annotated[Path, _DEMO_LOGS] = Path("traindiag-demo"),
) -> None:
    """Train a small Transformer on Python's own source at too high a learning rate, and be warned.

    Or choose another demo below.
    """
    if context.invoked_subcommand is not None:
        return
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


@demos.command()
def rl(
    seed: Annotated[int, typer.Option(min=0, help="Of weights, exploration and environment.")] = 0,
    log_dir: Annotated[Path, _DEMO_LOGS] = Path("traindiag-demo"),
) -> None:
    """Train two agents that swing up a pendulum: a healthy one, and one whose critic is ruined before it acts."""
    from traindiag.demo.rl.show import show

    try:
        show(seed, log_dir)
    except ImportError as error:
        raise typer.BadParameter(str(error)) from error


@demos.command()
def continual(
    replay: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of English in the second phase [default: 0.5, then 0, compared]."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the data.")] = 0,
    log_dir: Annotated[Path, _DEMO_LOGS] = Path("traindiag-demo"),
) -> None:
    """Train a small Transformer on English and then on Python, and be told what becomes of its English."""
    from traindiag.demo.show_continual import show

    show((0.5, 0.0) if replay is None else (replay,), seed, log_dir)


_RULES = typer.Option(
    "--rules",
    metavar="FILE",
    help="YAML with rules, default_rules and exclude, or the settings file of a run [default: the default pack].",
)
_MAP = typer.Option(
    "--map",
    metavar="NAME=SIGNAL",
    help="What a number of somebody else's log is, such as train/nll=loss/value or eta=learning_rate; repeatable.",
)
_LOGDIR = typer.Argument(help="Event file, folder, CSV or JSONL with a column of steps, or trainer_state.json.")


class _Format(str, Enum):
    TEXT = "text"
    JSON = "json"


class _Severity(str, Enum):
    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@app.command("replay")
def replay_log(
    logdir: Annotated[Path, _LOGDIR],
    rules: Annotated[Path | None, _RULES] = None,
    names: Annotated[list[str] | None, _MAP] = None,
    output: Annotated[_Format, typer.Option("--format", help="For people or for programs.")] = _Format.TEXT,
) -> None:
    """Judge a stored log once more, with the rules of today or your own.

    A log of traindiag's own gives the alerts of its run. Other logs (TensorBoard scalars, CSV, JSONL, the Hugging
    Face Trainer's state) are taken by the names of their numbers: usual names are guessed and the guess is shown.
    """
    from traindiag.playback.show import show, to_json

    replayed = _replayed(logdir, rules, names)
    if output is _Format.JSON:
        typer.echo(to_json(replayed))
    else:
        from traindiag.panels.terminal import TerminalPanel

        show(replayed, TerminalPanel(sys.stdout))


@app.command()
def check(
    logdir: Annotated[Path, _LOGDIR],
    rules: Annotated[Path | None, _RULES] = None,
    names: Annotated[list[str] | None, _MAP] = None,
    fail_on: Annotated[_Severity, typer.Option(help="Least severity that fails.")] = _Severity.WARNING,
    min_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps below which silence proves nothing [default: 31].")
    ] = None,
) -> None:
    """Tell by exit code whether a run was healthy, for CI of training.

    0: healthy. 1: alerts of the severity of --fail-on or above. 2: wrong arguments or settings file. 3: no log, or
    none that can be read. 4: not enough evidence: too few steps, or hardly a rule had its signals.
    """
    from traindiag.playback import check as checking

    replayed = _replayed(logdir, rules, names)
    for run in replayed.runs:
        for note in run.notes:
            typer.echo(f"note: {note}", err=True)
    least = checking.MIN_STEPS if min_steps is None else min_steps
    code, reason = checking.check(replayed, fail_on.value, least)
    typer.echo(reason)
    raise typer.Exit(code)


class _ReportFormat(str, Enum):
    HTML = "html"
    MD = "md"


@app.command()
def report(
    logdir: Annotated[Path, _LOGDIR],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write [default: report.html; md: standard output].")
    ] = None,
    form: Annotated[
        _ReportFormat, typer.Option("--format", help="A page with figures, or Markdown for pull requests and notes.")
    ] = _ReportFormat.HTML,
    redact: Annotated[bool, typer.Option("--redact", help="Leave out hosts, paths and user names.")] = False,
    fields: Annotated[
        str | None,
        typer.Option("--redact-fields", metavar="A,B", help="Leave out these settings too, such as seed,lr."),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Training diagnostics",
) -> None:
    """Write what happened in a run, or in several, into one file that opens offline.

    First warning, evidence, what to do, figures of each family and the configuration; and when the loss itself, or a
    rule of 6 standard deviations on it, would have told. 3: no log, or none that can be read.
    """
    from traindiag.panels.report.page import rendered
    from traindiag.panels.report.redaction import redacted
    from traindiag.playback.check import UNREADABLE
    from traindiag.playback.foreign import Unreadable
    from traindiag.playback.report import make_report

    try:
        found = make_report(logdir, title=title, version=traindiag.__version__)
    except (Unreadable, OSError) as error:
        typer.echo(f"unreadable: {error}", err=True)
        raise typer.Exit(UNREADABLE) from error
    if redact or fields is not None:
        try:
            found = redacted(found, [name for name in (fields or "").split(",") if name.strip()])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--redact-fields") from error
    try:
        written = rendered(found, form.value)
    except ModuleNotFoundError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if output is None and form is _ReportFormat.MD:
        typer.echo(written)
        return
    target = Path("report.html") if output is None else output
    target.write_text(written, "utf-8")
    typer.echo(f"{target}: {len(found.runs)} run{'s' * (len(found.runs) != 1)}, {len(written) / 1e6:.1f} MB")


def _replayed(logdir: Path, rules: Path | None, names: list[str] | None) -> Replay:
    """Wrong arguments leave by exit code 2, as all others do; a log that cannot be read by 3."""
    from traindiag.playback.check import UNREADABLE
    from traindiag.playback.foreign import Unreadable
    from traindiag.playback.replay import replay
    from traindiag.rules.rules_file import read_rules

    try:
        chosen = None if rules is None else read_rules(rules)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--rules") from error
    pairs = [text.rpartition("=") for text in names or ()]
    wrong = next((text for text, (name, _, signal) in zip(names or (), pairs) if not (name and signal)), None)
    if wrong is not None:
        raise typer.BadParameter(f"expected NAME=SIGNAL, got {wrong!r}", param_hint="--map")
    try:
        return replay(logdir, chosen, names={name: signal for name, _, signal in pairs})
    except (Unreadable, OSError) as error:
        typer.echo(f"unreadable: {error}", err=True)
        raise typer.Exit(UNREADABLE) from error
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--map") from error


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


def rules_table(rows: Iterable[Described]) -> Table:
    """One row a default rule: name and severity on the left; what it is for, its numbers and source on the right."""
    table = Table(box=box.HORIZONTALS, show_header=False, show_lines=True, padding=(0, 3, 0, 0), border_style="dim")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        rule = row.rule
        judged = ", ".join(rule.signals) or "every signal"
        numbers = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in _chosen(rule).items())
        table.add_row(
            Text.assemble((rule.name, "bold"), f"\n{getattr(rule, 'severity', 'by what it finds')}"),
            Text.assemble(
                f"{row.says}\n", (f"{judged}{': ' * bool(numbers)}{numbers}\n", "cyan"), (row.source, "dim italic")
            ),
        )
    return table


def _chosen(rule: Rule) -> dict[str, object]:
    """The numbers of a rule that are set."""
    plain = {k: v for k, v in rule.settings().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    idle = {"cooldown", "window", "min_samples"} | (set() if getattr(rule, "inherit", False) else {"growth"})
    return {k: v for k, v in plain.items() if v and k not in idle and (k, v) != ("persistence", 1)}


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
    return {"fast": "every step", "slow": "at the cadence", "active": "as its monitor says"}[signal.lane]
