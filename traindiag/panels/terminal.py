"""What a run says on the terminal: what is seen, what is wrong, and how it ended."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from traindiag.alerts.alert import Alert
from traindiag.alerts.text import one_line, render
from traindiag.record.coverage import Coverage
from traindiag.record.series import Series
from traindiag.record.spike_score import spike_scores

_STYLES = {"info": "cyan", "warning": "bold yellow", "critical": "bold red", "closed": "green"}
_HEADLINES = (
    "attention/max_logit",
    "attention/max_logit_bound",
    "attention/logit_range",
    "attention/entropy",
    "output/log_z",
    "gradient/norm",
    "gradient/norm_applied",
    "loss/value",
)
_PLAIN_WIDTH = 100  # of a log file, where there is no terminal to ask
_MAX_WIDTH = 120  # longer lines are hard to read


class TerminalPanel:
    """Prints to standard error, above a running progress bar and never through it.

    Args:
        stream: Where to; by default what ``sys.stderr`` is at that moment.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._explained: dict[tuple[str, tuple[str, ...]], int] = {}

    def start(self, coverage: Sequence[Coverage], links: Sequence[str] = ()) -> None:
        """Tells what is watched and, where there is a log, how to open it.

        Args:
            coverage: What is seen and what is not.
            links: The command that starts TensorBoard and the links into it, the one to read first.
        """
        rows = Table.grid(padding=(0, 2, 0, 0))
        families = dict.fromkeys(row.family for row in coverage)
        watched = [_watched(f, [r for r in coverage if r.family == f]) for f in families]
        rows.add_row(Text("traindiag", "bold"), "watches " + ", ".join(w for w in watched if w))
        for row in coverage:
            if row.sight != "exact":
                names = row.places if len(row.places) <= 2 else (row.places[0], f"{len(row.places) - 1} more")
                label = "not seen" if row.sight == "unseen" else "in part"
                where = f"{row.family} of {', '.join(names)}" if names else row.family
                rows.add_row(Text(label, "yellow"), f"{where}: {row.reason}")
        if links:
            rows.add_row(Text("to see it", "bold"), links[0])
            for link in links[1:] if self._colours else ():
                # Links are too long to read; a terminal shows where they lead and opens the whole of them.
                rows.add_row("", Text(_address(link), f"underline link {link}"))
        self._print(rows)
        for link in () if self._colours else links[1:]:
            self._print(Text(f"  {link}"))

    def alerts(self, alerts: Iterable[Alert]) -> None:
        """Prints one block an alert; one line for a note, and where an event closes.

        A cause and its remedies are told once a run: what follows refers back to the step.
        """
        for alert in alerts:
            explanation = (alert.cause, tuple(r.text for r in alert.remedies))
            before = self._explained.get(explanation)
            if before is not None and alert.remedies:
                told = f"as told at step {before}, and so is what to do"
                alert = replace(alert, cause=told, ruled_out=(), remedies=())
            elif alert.severity != "info" and alert.status != "closed":
                self._explained[explanation] = alert.step
            self._print(alert_block(alert, self._console().width))

    def note(self, text: str) -> None:
        """Prints one line about diagnostics themselves."""
        self._print(Text.assemble(("traindiag", "bold"), f"  {text}"))

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Prints labels with what there is to say; a label is shown once for all its rows.

        Example:
            >>> TerminalPanel(sys.stdout).facts([("names", "a is loss/value"), ("names", "b is gradient/norm")])
            names  a is loss/value
                   b is gradient/norm
        """
        table = Table.grid(padding=(0, 2, 0, 0))
        before = ""
        for label, text in rows:
            table.add_row(Text(label if label != before else "", "bold"), Text(text))
            before = label
        self._print(table)

    def blank(self) -> None:
        """Prints an empty line."""
        self._print(Text())

    def summary(
        self,
        history: Mapping[str, Series],
        alerts: Sequence[Alert],
        steps: int,
        overhead: float | None = None,
        silenced: Mapping[str, str] | None = None,
    ) -> None:
        """Prints how a run ended.

        Args:
            history: Every signal.
            alerts: Every message of the run.
            steps: Steps done.
            overhead: Share of the step time that diagnostics took, where it was measured.
            silenced: Default rules that were kept from judging, with the reasons.
        """
        self._print(summary_table(history, alerts, steps, overhead))
        for name, reason in (silenced or {}).items():
            self._print(Text.assemble("  ", ("silenced", "dim"), f": {name} ({' '.join(reason.split())})"))

    @property
    def _target(self) -> TextIO:
        return self._stream or sys.stderr

    @property
    def _colours(self) -> bool:
        # While a rich progress bar runs, the stream is a stand-in that prints above the bar.
        real = getattr(self._target, "rich_proxied_file", self._target)
        return real.isatty()

    def _console(self) -> Console:
        console = Console(
            file=io.StringIO(), force_terminal=self._colours, force_jupyter=False, markup=False, highlight=False
        )
        console.width = min(console.width, _MAX_WIDTH) if self._colours else _PLAIN_WIDTH
        return console

    def _print(self, content: RenderableType) -> None:
        console = self._console()
        with console.capture() as written:
            console.print(content, soft_wrap=isinstance(content, Text))
        # Tables fill their lines with blanks, which a log file need not keep.
        text = "".join(line.rstrip() + "\n" for line in written.get().splitlines())
        write_above_bars(text, self._target)


def write_above_bars(text: str, stream: TextIO) -> None:
    """Writes ``text`` so that running progress bars stay whole.

    A rich bar replaces the standard streams with ones that print above it; bars of tqdm have to be asked.
    """
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is not None:
        tqdm.write(text, file=stream, end="")
    else:
        stream.write(text)
    stream.flush()


def alert_block(alert: Alert, width: int) -> Text:
    """The text of an alert with its severity in colour and its labels held back."""
    if alert.status == "closed":
        return Text.assemble(("CLOSED", _STYLES["closed"]), f"  {alert.title or alert.rule} (step {alert.step})")
    if alert.severity == "info":
        note = Text(one_line(alert))
        note.stylize(_STYLES["info"], 0, len(alert.severity))
        return note
    text = Text(render(alert, width))
    text.stylize("bold", 0, (text.plain + "\n").index("\n"))
    text.stylize(_STYLES[alert.severity], 0, len(alert.severity))
    text.highlight_regex(r"(?m)^  \S[^\n]{9}", "dim")
    return Text("\n") + text


def summary_table(
    history: Mapping[str, Series], alerts: Sequence[Alert], steps: int, overhead: float | None
) -> RenderableType:
    """Alerts by severity and the worst of every headline signal."""
    worst = {a.id: a.severity for a in alerts if a.status != "closed"}  # an event once, at its last severity
    counts = Counter[str](worst.values())
    told = [
        Text(f"{counts[s]} {name}{'s' * (counts[s] != 1)}", _STYLES[s])
        for s, name in (("critical", "critical alert"), ("warning", "warning"), ("info", "note"))
        if counts[s]
    ]
    head = Text.assemble(
        ("traindiag", "bold"), f"  {steps:,} steps: ", Text(", ").join(told) if told else "no alerts"
    )
    if overhead is not None and math.isfinite(overhead):
        head.append(f"; cost {overhead:.1%} of the step time")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("signal", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("where it was worst", overflow="fold")
    for name in _HEADLINES:
        extreme = history[name].extreme() if name in history else None
        if extreme is not None:
            last = history[name].worst().compressed()[-1]
            numbers = [
                Text(_number(x), "" if math.isfinite(x) else _STYLES["critical"]) for x in (extreme.value, last)
            ]
            table.add_row(name, numbers[0], f"{extreme.step:,}", numbers[1], str(extreme.cell))
    parts: list[RenderableType] = [head]
    if table.row_count:
        parts.append(Padding(table, (0, 0, 0, 2)))
    if spikes := _spikes(history):
        parts.append(Padding(spikes, (0, 0, 0, 2)))
    return Group(*parts)


def _spikes(history: Mapping[str, Series]) -> Text | None:
    """The largest spike score of loss and gradient norm; nothing for a run too short to have one."""
    told = []
    for name, words in (("loss/value", "loss"), ("gradient/norm", "gradient norm")):
        scores = spike_scores(history[name]) if name in history else {}
        if scores:
            told.append(f"{words} {max(scores.values()):.2%}")
    return Text(f"spike score (share of steps 7 sigma away): {', '.join(told)}", "dim") if told else None


def _address(link: str) -> str:
    """The page and its tab, without what is to be shown there."""
    page, _, tab = link.partition("#")
    return f"{page.partition('?')[0]}#{tab.partition('&')[0]}"


def _watched(family: str, rows: Sequence[Coverage]) -> str:
    """``attention (10 of 12)``, or nothing where nothing is seen."""
    total = sum(len(row.places) for row in rows)
    seen = sum(len(row.places) for row in rows if row.sight != "unseen")
    if not seen:
        return ""
    return family + ("" if total == 1 else f" ({seen})" if seen == total else f" ({seen} of {total})")


def _number(value: float) -> str:
    digits, _, exponent = f"{value:.4g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits
