"""The overview: how each family is, what was told and when, and what could not be seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traindiag.alerts.alert import Remedy
from traindiag.alerts.text import number
from traindiag.panels.figures.content import Block, cards, figure, note, table
from traindiag.panels.figures.events import SEVERITIES, Event
from traindiag.panels.figures.view import View, metric
from traindiag.record.catalogue import BY_NAME

FAMILIES = ("attention", "output", "gradient", "optimizer", "activation", "loss", "plasticity", "stability", "wiring")
PANEL_OF = {
    "attention": "attention",
    "output": "output",
    "gradient": "gradients",
    "optimizer": "gradients",
    "activation": "activations",
    "plasticity": "plasticity",
    "stability": "stability",
}
"""Where to look for the signals of a family; anything else is shown in the overview."""

_THEIRS = "logged"
MAX_OWN = 12


def overview_blocks(view: View) -> list[Block]:
    blocks = [cards("health", "Health", health(view)), *timeline(view), alerts_table(view)]
    if view.last_step < 0:
        blocks.insert(0, note("The run has just begun: nothing was measured yet."))
    own = [name for family, names in view.families.items() if family not in (*FAMILIES, _THEIRS) for name in names]
    blocks += [b for name in own[:MAX_OWN] if (b := view.lines(name.replace("/", "-"), name, name)) is not None]
    if len(own) > MAX_OWN:
        blocks.append(note(f"{len(own) - MAX_OWN} more signals of your own are in the log."))
    blocks.append(coverage_table(view))
    blocks += [note(f"Not read: {text}") for text in view.problems]
    return blocks


def health(view: View) -> list[dict[str, str]]:
    """One card a family: the worst that was told of it, or that nothing was seen of it, which is not health."""
    known = [*FAMILIES, *(f for f in view.families if f not in (*FAMILIES, _THEIRS))]
    found = []
    for family in known:
        events = [e for e in view.events if e.opened.family == family]
        gaps = [row for row in view.log.coverage if row.family == family and row.sight != "exact"]
        state, value, text = "unseen", "not seen", ""
        if events:
            worst = max(events, key=lambda e: SEVERITIES.index(e.severity))
            running = [e for e in events if e.closed is None]
            state = worst.severity
            value = {"info": "note"}.get(state, state)
            text = worst.title + ("" if running else " (over)")
        elif family in view.families:
            state, value = "quiet", "nothing found"
            count = len(view.families[family])
            text = f"{count} signal{'s' * (count > 1)}"
        if not events and gaps:
            text = gaps[0].reason or text
        if not events and gaps and family in view.families:
            value = "nothing found" if all(row.sight == "bound" for row in gaps) else "nothing found in what is seen"
        found.append(
            {"title": family, "value": value, "state": state, "note": text, "panel": PANEL_OF.get(family, "")}
        )
    return found


def timeline(view: View) -> list[Block]:
    """The loss with everything that was told over it."""
    series = view.series("loss/value")
    chart = view.chart("loss/value", title="training loss", log=False, height=170 if series is None else 320)
    if series is not None:
        view.repeats(chart, "loss/value")
        for i in range(min(len(series.cells), 6)):
            name = series.cells.label(i) if len(series.cells) > 1 else "training loss"
            column = series.values[:, i], series.seen[:, i]
            chart.line(name, series.steps, *column, colour=view.colour(i), width=1.6, markers=len(series) < 30)
    shown = chosen(view)
    chart.events(shown, legend=True)
    chart.jobs(view.jobs)
    if chart.empty:
        return []
    text = "Marks above the chart are alerts, at the step that was judged." if shown else "Nothing was told."
    if series is None:
        text += " The loss was not measured."
    block = figure("timeline", "Alerts over the loss", chart.figure(), text)
    return [block]


def chosen(view: View) -> list[Event]:
    """Events of the severities that were chosen, such as ``warning,critical``; all by default."""
    wanted = {s for s in view.options.get("severity", "").split(",") if s in SEVERITIES} or set(SEVERITIES)
    return [e for e in view.events if e.severity in wanted]


def alerts_table(view: View) -> Block:
    """One row an event; its panel, signal, cell and step are where to look."""
    columns = [
        ("severity", "severity", "severity"),
        ("step", "step", "step"),
        ("closed", "over at", "step"),
        ("title", "what", "text"),
        ("where", "where", "text"),
        ("value", "value", "number"),
        ("limit", "limit", "number"),
        ("evidence", "evidence", "list"),
        ("cause", "cause", "text"),
        ("remedies", "what to do", "remedies"),
    ]
    return table("alerts", "Alerts", columns, [_row(e) for e in chosen(view)])


def _row(event: Event) -> dict[str, object]:
    worst, opened, advice = event.worst, event.opened, event.advice()
    return {
        "id": event.id,
        "severity": event.severity,
        "step": opened.step,
        "closed": event.closed,
        "title": event.title,
        "where": worst.where,
        "signal": worst.signal,
        "value": number(worst.value),
        "limit": None if worst.limit is None else number(worst.limit),
        "evidence": [text for text in worst.evidence.split("; ") if text],
        "cause": advice.cause,
        "ruled_out": list(advice.ruled_out),
        "remedies": [_remedy(r) for r in advice.remedies],
        "rule": worst.rule,
        "diagnosis": worst.diagnosis,
        "link": {
            "panel": PANEL_OF.get(worst.signal.split("/", 1)[0], "overview"),
            "options": {"signal": worst.signal, "cell": worst.where, "step": str(worst.step)},
        },
    }


def _remedy(remedy: Remedy) -> dict[str, object]:
    return {"text": remedy.text, "when": remedy.when, "source": remedy.source, "change": dict(remedy.change)}


def coverage_table(view: View) -> Block:
    """What is seen and what is not, and why."""
    columns = [
        ("family", "family", "text"),
        ("sight", "seen", "text"),
        ("count", "places", "number"),
        ("places", "which", "text"),
        ("reason", "why not exactly", "text"),
    ]
    rows = [
        {
            "family": row.family,
            "sight": row.sight,
            "count": len(row.places),
            "places": _few(row.places),
            "reason": row.reason,
        }
        for row in view.log.coverage
    ]
    return table("coverage", "Coverage", columns, rows)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 3 else [names[0], names[1], f"... {names[-1]}"])


def last_values(view: View) -> list[dict[str, object]]:
    """First, worst and last value of every signal, for a table."""
    rows = []
    for names in view.families.values():
        for name in names:
            series = view.series(name)
            extreme = series.extreme() if series is not None else None
            if series is None or extreme is None:
                continue
            last = series.worst().compressed()
            rows.append(
                {
                    "signal": name,
                    "what": metric(name),
                    "worst": number(extreme.value),
                    "step": extreme.step,
                    "where": str(extreme.cell),
                    "last": number(float(last[-1])) if np.size(last) else "",
                    "unit": BY_NAME[name].unit if name in BY_NAME else series.signal.unit,
                }
            )
    return rows
