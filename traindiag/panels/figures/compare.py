"""Runs against each other: the same chart for up to four of them, and a table of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traindiag.alerts.text import number
from traindiag.panels.figures.chart import Chart
from traindiag.panels.figures.content import Block, figure, note, table
from traindiag.panels.figures.view import View, axis_title, wide

MOST = 4
"""Runs that one chart can tell apart."""

CHARTS = (
    ("loss/value", "Training loss"),
    ("attention/logit_range", "Largest attention logit that softmax feels, of all heads"),
    ("attention/entropy", "Lowest attention entropy, of all heads"),
    ("output/log_z", "Log Z of the output logits"),
    ("gradient/norm", "Gradient norm before clipping"),
    ("optimizer/update_ratio", "Largest update against the weights, of all parameters"),
    ("optimizer/grad_rms_over_eps", "Smallest gradient RMS over epsilon, of all parameters"),
    ("activation/rms", "Largest residual stream, of all blocks"),
)


def compare_blocks(views: Sequence[View]) -> list[Block]:
    if len(views) < 2:
        return [note("Choose a second run to compare it with this one.")]
    blocks: list[Block] = [runs_table(views)]
    if len(views) > MOST:
        blocks.append(note(f"Charts show the first {MOST} of {len(views)} runs; the table has all of them."))
    known = {name for name, _ in CHARTS}
    others = [
        name for view in views for name in view.families.get("plasticity", []) + view.families.get("stability", [])
    ]
    charts = [*CHARTS, *((name, name) for name in dict.fromkeys(others) if name not in known)]
    blocks += [b for name, title in charts if (b := worst_of_each(views[:MOST], name, title)) is not None]
    return blocks


def worst_of_each(views: Sequence[View], name: str, title: str) -> Block | None:
    """The worst cell of one signal, a line a run."""
    found = [(view, s) for view in views if (s := view.series(name)) is not None]
    if not found:
        return None
    chart = Chart(views[0].colours, axis_title(found[0][1]), log=wide([s for _, s in found]))
    for k, view in enumerate(views):
        series = view.series(name)
        if series is None:
            continue
        worst = series.worst()
        chart.line(
            view.name,
            series.steps,
            np.asarray(worst.data),
            ~np.ma.getmaskarray(worst),
            colour=view.colour(k),
        )
    chart.limits(views[0].limits.get(name, ()))
    lacking = [view.name for view in views if view.series(name) is None]
    text = f"Not measured in {', '.join(lacking)}." if lacking else ""
    return figure(f"compare-{name.replace('/', '-')}", title, chart.figure(), text)


def runs_table(views: Sequence[View]) -> Block:
    """One row a run; sorted by any column."""
    columns = [
        ("run", "run", "text"),
        ("severity", "worst", "severity"),
        ("alerts", "alerts", "number"),
        ("first", "first warning", "step"),
        ("steps", "last step", "step"),
        ("loss", "last loss", "number"),
        ("best", "lowest loss", "number"),
        ("range", "attention logits", "number"),
        ("norm", "gradient norm", "number"),
        ("lr", "peak rate", "number"),
        ("parameters", "parameters", "number"),
    ]
    return table("runs", "Runs", columns, [_row(view) for view in views])


def _row(view: View) -> dict[str, object]:
    told = [e for e in view.events if e.severity != "info"]
    levels = ("quiet", "info", "warning", "critical")
    worst = max((e.severity for e in view.events), key=levels.index, default="quiet")
    loss = view.series("loss/value")
    values = loss.worst().compressed() if loss is not None else np.empty(0)
    good = values[np.isfinite(values)]
    rates = [o.peak_lr for o in view.log.run.optimizers if o.peak_lr is not None]
    return {
        "run": view.name,
        "severity": worst,
        "alerts": len(told),
        "first": min((e.opened.step for e in told), default=None),
        "steps": view.last_step,
        "loss": number(float(values[-1])) if values.size else None,
        "best": number(float(good.min())) if good.size else None,
        "range": _extreme(view, "attention/logit_range"),
        "norm": _extreme(view, "gradient/norm"),
        "lr": max(rates, default=None),
        "parameters": view.log.run.parameters,
    }


def _extreme(view: View, name: str) -> str | None:
    series = view.series(name)
    extreme = series.extreme() if series is not None else None
    return number(extreme.value) if extreme is not None else None
