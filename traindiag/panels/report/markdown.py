"""The report as Markdown, for pull requests and incident notes: the same words and numbers, without figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traindiag.alerts.alert import Alert
from traindiag.alerts.text import escape, number
from traindiag.panels.figures.events import Event
from traindiag.panels.figures.view import View
from traindiag.panels.report.story import Report, ReportedRun, configuration, settings_of, verdict

SIGNALS = (
    "loss/value",
    "attention/logit_range",
    "attention/entropy",
    "output/log_z",
    "gradient/norm",
    "optimizer/rms_t",
    "optimizer/update_ratio",
    "optimizer/grad_rms_over_eps",
    "activation/rms",
    "activation/zero_fraction",
)
"""One line each in the table of numbers."""

MOST_NOTES = 10
_BARS = "▁▂▃▄▅▆▇█"


def text(value: object) -> str:
    r"""Anything as plain text of Markdown: no markup, no link, and nobody is mentioned.

    Example:
        >>> print(text("<b>@all</b> www.example.com | [a](b)"))
        &lt;b&gt;@&#8203;all&lt;/b&gt; www&#46;example.com \| \[a\](b)
    """
    return escape(str(value)).replace("@", "@&#8203;").replace("www.", "www&#46;")


def markdown_report(report: Report) -> str:
    """The whole report."""
    lines = [f"# {text(report.title)}", ""]
    if len(report.runs) > 1:
        lines += _compared(report.runs)
    for run in report.runs:
        lines += _run(run, len(report.runs) > 1)
    lines += [f"Left out on request: {text(', '.join(report.hidden))}."] if report.hidden else []
    made = ", ".join(text(part) for part in (f"traindiag {report.version}".strip(), report.made) if part)
    return "\n".join([*lines, "", f"Made by {made}.", ""])


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve in one line of text; ``!`` stands where a value is NaN or infinite.

    Example:
        >>> sparkline([3, 2, 1, 1, float("nan"), 8])
        '▃▂▁▁!█'
    """
    given = np.asarray(values, np.float64)
    parts = np.array_split(given, min(width, len(given))) if len(given) else []
    bad = [bool((~np.isfinite(p)).any()) for p in parts]
    levels = np.array([p[np.isfinite(p)].mean() if np.isfinite(p).any() else np.nan for p in parts])
    good = levels[np.isfinite(levels)]
    if not good.size:
        return "!" * len(parts)
    low, span = good.min(), (good.max() - good.min()) or 1.0
    return "".join(
        "!" if wrong or not np.isfinite(v) else _BARS[round((v - low) / span * 7)] for v, wrong in zip(levels, bad)
    )


def _compared(runs: Sequence[ReportedRun]) -> list[str]:
    lines = _table(("run", "worst", "first warning", "the loss showed it", "6-sigma rule on the loss", "steps"))
    for run in runs:
        summed = verdict(run, View(run.name, run.log))
        facts = [value for _, value, _, _ in summed.facts]
        lines.append(_row((run.name, summed.label, *facts)))
    return [*lines, ""]


def _run(run: ReportedRun, several: bool) -> list[str]:
    view = View(run.name, run.log)
    summed = verdict(run, view)
    lines = [f"## {text(run.name)}", ""] if several or run.name else []
    lines += [f"**{text(summed.label)}**: {text(summed.headline)}", ""]
    lines += [text(sentence) + "\n" for sentence in summed.sentences]
    lines += _table(("", "", ""))
    lines += [_row((title, value, note)) for title, value, note, _ in summed.facts]
    lines.append("")
    lines += _events(view.events)
    lines += _numbers(view)
    known = configuration(run.log)
    if known:
        lines += ["### Configuration", "", *_table(("", "")), *(_row(row) for row in known), ""]
    unseen = [row for row in run.log.coverage if row.sight != "exact"]
    if unseen:
        lines += ["### Not, or not exactly, seen", ""]
        lines += [f"- {text(r.family)} ({text(r.sight)}, {len(r.places)}): {text(r.reason)}" for r in unseen] + [""]
    notes = list(dict.fromkeys((*view.problems, *run.notes)))
    if notes:
        lines += ["### About this log", "", *(f"- {text(note)}" for note in notes), ""]
    return lines


def _events(events: Sequence[Event]) -> list[str]:
    loud = [e for e in events if e.severity != "info"]
    notes = [e for e in events if e.severity == "info"]
    lines = ["### What was told", ""]
    for event in loud:
        lines += _event(event)
    if not loud:
        lines += ["Nothing at warning or above.", ""]
    lines += [f"- note, step {e.opened.step}: {text(e.title)}" for e in notes[:MOST_NOTES]]
    lines += [f"- {len(notes) - MOST_NOTES} more notes"] if len(notes) > MOST_NOTES else []
    return [*lines, ""] if notes else lines


def _event(event: Event) -> list[str]:
    worst, advice = event.worst, event.advice()
    when = ", ".join(f"{level} at step {step}" for step, level in event.levels)
    over = f", over at step {event.closed}" if event.closed is not None else ""
    where = f" at {worst.where}" if worst.where and worst.where not in event.title else ""
    lines = [f"#### {text(event.title)}", "", f"{text(when + where + over)} ({text(worst.rule)})", ""]
    lines += [f"- {text(said)}" for said in worst.evidence.split("; ") if said]
    if advice.cause:
        lines += ["", f"Cause: {text(advice.cause)}"]
    if advice.ruled_out:
        lines += ["", f"Ruled out: {text('; '.join(advice.ruled_out))}"]
    return [*lines, *_remedies(advice), ""]


def _remedies(advice: Alert) -> list[str]:
    lines = ["", "What to do, best first:", ""] if advice.remedies else []
    for i, remedy in enumerate(advice.remedies, 1):
        change = f" ({settings_of(remedy.change)})" if remedy.change else ""
        source = f"; {remedy.source}" if remedy.source else ""
        lines.append(f"{i}. {text(remedy.text + change)} *{text(remedy.when)}*{text(source)}")
    return lines


def _numbers(view: View) -> list[str]:
    rows = []
    for name in SIGNALS:
        series = view.series(name)
        extreme = series.extreme() if series is not None else None
        if series is None or extreme is None:
            continue
        course = series.worst().compressed()
        place = " ".join(word for word in (str(extreme.cell), f"step {extreme.step}") if word)
        rows.append(_row((name, sparkline(course.tolist()), number(extreme.value), place, number(float(course[-1])))))
    if not rows:
        return []
    return ["### Numbers", "", *_table(("signal", "worst cell over time", "worst", "where", "last")), *rows, ""]


def _table(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def _row(values: Sequence[object]) -> str:
    return "| " + " | ".join(text(v) for v in values) + " |"
