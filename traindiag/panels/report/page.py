"""The report as one HTML file that fetches nothing.

There is no template language: every string passes :func:`text` on its way into the page. That is easier to see and to
test than the settings of an engine that escapes for us, and it saves a dependency.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from traindiag.alerts.text import printable
from traindiag.panels.figures import PANELS, Block, build
from traindiag.panels.figures.style import PALETTES
from traindiag.panels.figures.view import View
from traindiag.panels.report.markdown import markdown_report
from traindiag.panels.report.story import Report, ReportedRun, Verdict, configuration, settings_of, verdict

_HERE = Path(__file__).parent
WIDE = (
    "timeline",
    "heads-over-steps",
    "gradient-by-block",
    "update-ratio-by-parameter",
    "rms-over-steps",
    "old-tasks-value",
    "old-tasks-loss",
)
"""Figures that take the whole width: what has a row a place, and the loss."""
MOST_COLUMNS = 3
"""Runs that stand side by side; more are compared in one chart and a table."""


def text(value: object) -> str:
    """Anything as text of the page: names and messages are never markup.

    Example:
        >>> text("<script>alert(1)</script>")
        '&lt;script&gt;alert(1)&lt;/script&gt;'
    """
    return html.escape(printable(str(value)))


def plotly_script() -> str:
    """plotly.js out of the installed package.

    Raises:
        ModuleNotFoundError: With what to install, where it is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a report as HTML draws its figures with plotly, which is not installed: "
            'pip install "traindiag[report]"; as Markdown (--format md) it needs none',
            name="plotly",
        ) from error
    return str(get_plotlyjs())


def html_page(report: Report) -> str:
    """The whole file.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
    """
    page = _Page(report)
    body = page.body()
    title = text(report.title if len(report.runs) != 1 else f"{report.runs[0].name}: {report.title}")
    # nothing may be fetched, whatever is in the log
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en" data-theme="light">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{title}</title>",
            f"<style>{(_HERE / 'page.css').read_text('utf-8')}</style>",
            "</head>",
            "<body>",
            body,
            f'<script type="application/json" id="figures">{in_script(page.figures)}</script>',
            f'<script type="application/json" id="dark">{in_script(dark_colours())}</script>',
            f"<script>{plotly_script()}</script>",
            f"<script>{(_HERE / 'page.js').read_text('utf-8')}</script>",
            "</body>",
            "</html>",
            "",
        )
    )


def rendered(report: Report, form: str = "html") -> str:
    """The report as a page (``html``) or as Markdown (``md``).

    Raises:
        ModuleNotFoundError: If it is to be a page and plotly is not installed.
        ValueError: If there is no such form.
    """
    if form == "html":
        return html_page(report)
    if form == "md":
        return markdown_report(report)
    raise ValueError(f"a report is written as 'html' or 'md', got {form!r}")


def in_script(data: Any) -> str:
    r"""JSON that cannot end the script element that it stands in.

    Example:
        >>> in_script({"a": "</script>"})
        '{"a":"\\u003c/script>"}'
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def dark_colours() -> dict[str, str]:
    """What each colour of the light theme is in the dark one, as ``#rrggbb`` and as the beginning of ``rgba(``."""
    light, dark = PALETTES["light"], PALETTES["dark"]
    pairs = dict(zip(light.series, dark.series))
    names = ("text", "faint", "grid", "empty", "info", "warning", "critical", "healthy", "nonfinite", "surface")
    pairs |= {getattr(light, name): getattr(dark, name) for name in names}
    return pairs | {_rgb(a): _rgb(b) for a, b in pairs.items()}


def _rgb(colour: str) -> str:
    return "rgba(" + ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


class _Page:
    """Collects the figures while the body is written."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.figures: dict[str, Any] = {}
        self.views = [View(run.name, run.log) for run in report.runs]

    def body(self) -> str:
        runs = self.report.runs
        several = len(runs) > 1
        sections = [self._compared()] if several else []
        for at, run in enumerate(runs):
            sections.append(self._run(at, run, verdict(run, self.views[at])))
        panels = [p for p in PANELS if p.id not in ("overview", "compare")]
        side_by_side = several and len(runs) <= MOST_COLUMNS
        shown = []
        if not several or side_by_side:
            for panel in panels:
                if any(f in view.families for view in self.views for f in panel.families):
                    shown.append((panel.id, panel.title))
                    sections.append(self._panel(panel.id, panel.title))
        sections += [self._configuration(), self._coverage(), self._trouble()]
        links = [("compare", "Compare")] if several else []
        links += [("alerts-0", "Alerts")] if not several else []
        links += [*shown, ("configuration", "Configuration"), ("coverage", "Coverage")]
        nav = "".join(f'<a href="#{key}">{text(name)}</a>' for key, name in links)
        return (
            f'<div class="bar"><div><b>{text(self.report.title)}</b><nav>{nav}</nav>'
            '<button id="theme" type="button" aria-label="Switch between light and dark">Dark</button></div></div>'
            f"<main>{''.join(sections)}{self._footer()}</main>"
        )

    def _run(self, at: int, run: ReportedRun, summed: Verdict) -> str:
        info = run.log.run
        facts = [info.model or "", f"{info.parameters:,} parameters" if info.parameters else "", run.source]
        meta = " &middot; ".join(text(fact) for fact in facts if fact)
        kicker = f'<span class="pill {summed.state}">{text(summed.label)}</span><span>{text(run.name)}</span>'
        numbers = "".join(
            f'<dl class="fact {state}"><dt>{text(title)}</dt><dd>{text(value)}</dd><dd>{text(note)}</dd></dl>'
            for title, value, note, state in summed.facts
        )
        said = "".join(f"<p>{text(sentence)}</p>" for sentence in summed.sentences)
        said = f'<div class="sentences">{said}</div>' if said else ""
        overview = build("overview", {run.name: run.log}).blocks
        parts = [
            f'<header class="run" id="run-{at}"><div class="kicker">{kicker}</div><h1>{text(summed.headline)}</h1>'
            f'<div class="meta">{meta}</div>{said}</header>',
            f'<div class="facts">{numbers}</div>',
        ]
        for block in overview:
            if block["kind"] == "cards":
                parts.append(_section(f"health-{at}", "Health by family", _health(block)))
            elif block["kind"] == "table" and block["id"] == "alerts":
                parts.append(_section(f"alerts-{at}", "What was told", self._alerts(block["rows"])))
            elif block["kind"] == "figure" and block["id"] == "timeline":
                parts.append(f"<section>{self._figure(block, f'{at}-')}</section>")
        own = [b for b in overview if b["kind"] == "figure" and b["id"] != "timeline"]
        if own:
            parts.append(_section(f"own-{at}", "Numbers of your own", self._blocks(own, f"{at}-")))
        return "".join(parts)

    def _alerts(self, rows: Sequence[Mapping[str, Any]]) -> str:
        if not rows:
            return '<p class="note">Nothing was told.</p>'
        loud = [row for row in rows if row["severity"] != "info"]
        notes = [row for row in rows if row["severity"] == "info"]
        return "".join(_alert(row, opened=row in loud[:3] or len(rows) == 1) for row in (*loud, *notes))

    def _compared(self) -> str:
        logs = {run.name: run.log for run in self.report.runs}
        return _section("compare", f"{len(logs)} runs", self._blocks(build("compare", logs).blocks, "compare-"))

    def _panel(self, panel: str, title: str) -> str:
        options = {"slider": "inline"}
        logs = [{run.name: run.log} for run in self.report.runs]
        built = [list(build(panel, log, options=options).blocks) for log in logs]
        if len(built) == 1:
            return _section(panel, title, self._blocks(built[0], f"{panel}-"))
        names = "".join(f'<div class="name">{text(run.name)}</div>' for run in self.report.runs)
        style = f'class="columns" style="--runs:{len(built)}"'
        rows = [f"<div {style}>{names}</div>"]
        order = dict.fromkeys(_key(b) for blocks in built for b in blocks)
        for key in order:
            cells = []
            for at, blocks in enumerate(built):
                found = next((b for b in blocks if _key(b) == key), None)
                cells.append("<div></div>" if found is None else self._block(found, f"{panel}-{at}-"))
            rows.append(f"<div {style}>{''.join(cells)}</div>")
        return _section(panel, title, "".join(rows))

    def _blocks(self, blocks: Iterable[Block], prefix: str) -> str:
        parts: list[str] = []
        for figures, group in groupby(blocks, key=lambda b: b["kind"] == "figure"):
            if figures:
                parts.append(f'<div class="grid">{self._grid(list(group), prefix)}</div>')
            else:
                parts += [self._block(block, prefix) for block in group]
        return "".join(parts)

    def _grid(self, blocks: Sequence[Block], prefix: str) -> str:
        """Two figures a row; one that would stand alone takes the whole of it."""
        cells, half = [], False
        for at, block in enumerate(blocks):
            follows = at + 1 < len(blocks) and blocks[at + 1]["id"] not in WIDE
            wide = block["id"] in WIDE or not (half or follows)
            half = not wide and not half
            cells.append(self._figure(block, prefix, wide=wide))
        return "".join(cells)

    def _block(self, block: Block, prefix: str) -> str:
        if block["kind"] == "figure":
            return self._figure(block, prefix)
        if block["kind"] == "table":
            return f'<div class="panelbox">{_table(block)}</div>'
        if block["kind"] == "cards":
            return _health(block)
        return f'<p class="note">{text(block["text"])}</p>'

    def _figure(self, block: Block, prefix: str, *, wide: bool = False) -> str:
        key = f"f{len(self.figures)}"
        self.figures[key] = block["figure"]
        note = f"<figcaption>{text(block['note'])}</figcaption>" if block["note"] else ""
        kind, name = ' class="wide"' if wide else "", text(prefix + block["id"])
        plot = f'<div class="plot" role="img" aria-label="{text(block["title"])}" data-figure="{key}"></div>'
        return f'<figure{kind} id="{name}"><h3>{text(block["title"])}</h3>{note}{plot}</figure>'

    def _configuration(self) -> str:
        runs = self.report.runs
        tables = [dict(configuration(run.log)) for run in runs]
        keys = list(dict.fromkeys(key for table in tables for key in table))
        head = "<thead><tr><th></th>" + "".join(f"<th>{text(r.name)}</th>" for r in runs) + "</tr></thead>"
        rows = "".join(
            f'<tr><th scope="row">{text(key)}</th>'
            + "".join(f"<td>{text(t.get(key, ''))}</td>" for t in tables)
            + "</tr>"
            for key in keys
        )
        body = f"<tbody>{rows}</tbody>"
        table = f'<div class="panelbox"><table>{head if len(runs) > 1 else ""}{body}</table></div>'
        return _section("configuration", "Configuration", table if keys else '<p class="note">Not known.</p>')

    def _coverage(self) -> str:
        parts = []
        for at, run in enumerate(self.report.runs):
            block = next(b for b in build("overview", {run.name: run.log}).blocks if b.get("id") == "coverage")
            name = f"<h3>{text(run.name)}</h3>" if len(self.report.runs) > 1 else ""
            found = _table(block) if block["rows"] else '<p class="note">The log does not tell what was seen.</p>'
            parts.append(f'{name}<div class="panelbox" id="coverage-{at}">{found}</div>')
        return _section("coverage", "What was seen, and what was not", "".join(parts))

    def _trouble(self) -> str:
        found = []
        for run, view in zip(self.report.runs, self.views):
            whose = f"{run.name}: " if len(self.report.runs) > 1 else ""
            found += [f"{whose}{note}" for note in dict.fromkeys((*view.problems, *run.notes))]
        found += [f"Left out on request: {', '.join(self.report.hidden)}."] if self.report.hidden else []
        if not found:
            return ""
        return _section("log", "About this log", "".join(f'<p class="trouble">{text(t)}</p>' for t in found))

    def _footer(self) -> str:
        version = f" {self.report.version}" if self.report.version else ""
        made = f", {self.report.made}" if self.report.made else ""
        said = f"Made by traindiag{version}{made}. This file fetches nothing."
        return f"<footer>{text(said)}</footer>"


def _section(key: str, title: str, content: str) -> str:
    return f'<section id="{key}"><div class="head"><h2>{text(title)}</h2></div>{content}</section>'


def _key(block: Block) -> str:
    return str(block.get("id", block["kind"]))


def _health(block: Block) -> str:
    found = "".join(
        f'<div class="card {card["state"]}"><h3>{text(card["title"])}</h3>'
        f'<div class="value">{text(card["value"])}</div>'
        f'<div class="say">{text(card["note"])}</div></div>'
        for card in block["cards"]
    )
    return f'<div class="health">{found}</div>'


def _alert(row: Mapping[str, Any], *, opened: bool) -> str:
    when = f"step {row['step']:,}" + (
        f" to {row['closed']:,}" if row["closed"] is not None else ", still open at the end"
    )
    left = [("Evidence", _list(row["evidence"])), ("Cause", f"<p>{text(row['cause'])}</p>" if row["cause"] else "")]
    left.append(("Ruled out", _list(row["ruled_out"])))
    remedies = "".join(
        f'<li>{text(r["text"])} <span class="when-to">{text(r["when"])}</span>'
        + (f" <code>{text(settings_of(r['change']))}</code>" if r["change"] else "")
        + (f'<span class="source">{text(r["source"])}</span>' if r["source"] else "")
        + "</li>"
        for r in row["remedies"]
    )
    right = f"<h4>What to do, best first</h4><ol>{remedies}</ol>" if remedies else ""
    facts = "".join(f"<h4>{name}</h4>{content}" for name, content in left if content)
    limit = f", limit {row['limit']}" if row["limit"] is not None else ""
    named = f"{row['signal']} {row['value']}{limit} ({row['rule']})"
    return (
        f'<details class="alert {row["severity"]}"{" open" if opened else ""}><summary>'
        f'<span class="pill {row["severity"]}">{text({"info": "note"}.get(row["severity"], row["severity"]))}</span>'
        f'<h3>{text(row["title"])}</h3><span class="when">{text(when)}</span></summary>'
        f'<div class="body"><div><p class="faint small mono">{text(named)}</p>{facts}</div>'
        f"<div>{right}</div></div></details>"
    )


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{text(t)}</li>" for t in texts) + "</ul>" if texts else ""


def _table(block: Block) -> str:
    columns = [c for c in block["columns"] if c["type"] not in ("list", "remedies")]
    head = "".join(f'<th class="{_align(c)}"><button type="button">{text(c["title"])}</button></th>' for c in columns)
    rows = "".join("<tr>" + "".join(_cell(row.get(c["id"]), c) for c in columns) + "</tr>" for row in block["rows"])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any, column: Mapping[str, str]) -> str:
    if column["type"] == "severity" and value:
        name = {"quiet": "nothing found", "info": "note"}.get(value, value)
        order = ("quiet", "info", "warning", "critical").index(value)
        return f'<td data-sort="{order}"><span class="pill {value}">{text(name)}</span></td>'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        return f'<td class="{_align(column)}" data-sort="{value}">{text(shown)}</td>'
    return f'<td class="{_align(column)}">{text("" if value is None else value)}</td>'


def _align(column: Mapping[str, str]) -> str:
    return "number" if column["type"] in ("number", "step") else "text"
