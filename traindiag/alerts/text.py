"""Alerts as text: a block, one line, or Markdown."""

from __future__ import annotations

import math
import re
import textwrap

from traindiag.alerts.alert import Alert, Span
from traindiag.rules.wording import in_steps, steps
from traindiag.rules.wording import number as number

_UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0), ("d", 86400.0))


def duration(seconds: float) -> str:
    """A time to wait, in its two largest units.

    Example:
        >>> [duration(x) for x in (0.4, 42.0, 250.0, 13800.0, 200000.0)]
        ['under 1 s', '42 s', '4 min 10 s', '3 h 50 min', '2 d 8 h']
    """
    if not math.isfinite(seconds):
        return "never"
    if seconds < 1:
        return "under 1 s"
    at = max(i for i, (_, size) in enumerate(_UNITS) if round(seconds) >= size)
    name, size = _UNITS[at]
    if at == 0:
        return f"{round(seconds)} s"
    small, part = _UNITS[at - 1]
    parts = round(seconds / part)
    if at + 1 < len(_UNITS) and parts * part >= _UNITS[at + 1][1]:  # 23 h 59.9 min
        return duration(parts * part)
    whole, rest = divmod(parts, round(size / part))
    return f"{whole} {name}" + (f" {rest} {small}" if rest else "")


def render(alert: Alert, width: int = 100) -> str:
    """One block of plain text, no line longer than ``width`` unless a single word is.

    Example:
        >>> alert = Alert("1f", "opened", "kl", "run", 0, 120, 0.0, None, "warning", "slow", "reward", "reward/kl",
        ...     "", 30.0, 10.0, "forecast", (60.0, 80.0, 110.0), (10440.0, 13800.0, 19440.0), title="KL grows")
        >>> print(render(alert))
        WARNING  KL grows
          step       120 (kl)
          value      reward/kl 30, limit 10
          crosses    in 80 steps (60-110), 3 h 50 min (2.9-5.4 h)
    """
    status = "" if alert.status == "opened" else f" ({alert.status})"
    lines = _wrapped(f"{alert.severity.upper()}{status}  ", alert.title or alert.rule, width)
    for name, texts in _facts(alert):
        for i, text in enumerate(texts):
            lines += _wrapped(f"  {name if i == 0 else '':<11}", text, width)
    for i, remedy in enumerate(alert.remedies):
        source = f" [{remedy.source}]" if remedy.source else ""
        head = f"  {'what to do' if i == 0 else '':<11}{i + 1}. "
        lines += _wrapped(head, f"{remedy.text} ({remedy.when}){source}", width)
    return "\n".join(lines)


def one_line(alert: Alert) -> str:
    """The same in one line, for a log.

    Example:
        >>> one_line(Alert("1f", "opened", "kl", "run", 0, 120, 0.0, None, "warning", "slow", "reward", "reward/kl",
        ...     "", 30.0, 10.0, "threshold", title="KL is high"))
        'WARNING step 120: KL is high (reward/kl 30, limit 10)'
    """
    status = "" if alert.status == "opened" else f" ({alert.status})"
    left = f"; crosses {_crossing(alert)}" if alert.steps_to_limit is not None else ""
    return printable(
        f"{alert.severity.upper()}{status} step {alert.step}: {alert.title or alert.rule} ({_value(alert)}{left})"
    )


def markdown(alert: Alert) -> str:
    r"""The same for a Markdown panel. Names from the model and from logs appear as text, whatever is in them.

    Example:
        >>> print(markdown(Alert("1f", "opened", "kl", "run", 0, 120, 0.0, None, "warning", "slow", "reward",
        ...     "reward/kl", "<b>|", 30.0, 10.0, "threshold", title="KL is high")))
        **WARNING** KL is high
        <BLANKLINE>
        - step: 120 (kl)
        - where: &lt;b&gt;\|
        - value: reward/kl 30, limit 10
    """
    status = "" if alert.status == "opened" else f" ({alert.status})"
    lines = [f"**{alert.severity.upper()}**{status} {escape(alert.title or alert.rule)}", ""]
    for name, texts in _facts(alert):
        if len(texts) == 1:
            lines.append(f"- {name}: {escape(texts[0])}")
        else:
            lines += [f"- {name}:", *(f"    - {escape(text)}" for text in texts)]
    if alert.remedies:
        lines += ["", "What to do, best first:", ""]
    for i, remedy in enumerate(alert.remedies, 1):
        source = f" [{remedy.source}]" if remedy.source else ""
        lines.append(f"{i}. {escape(remedy.text)} ({remedy.when}){escape(source)}")
    return "\n".join(lines)


def escape(text: str) -> str:
    r"""Text as Markdown shows it: no markup, table bars, links or HTML.

    Example:
        >>> print(escape("a|b <img> *x* [y](z)"))
        a\|b &lt;img&gt; \*x\* \[y\](z)
    """
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
    return text.replace("://", ":&#47;&#47;")  # some renderers make a link of a bare address


def _facts(alert: Alert) -> list[tuple[str, list[str]]]:
    """What there is to say, in the order in which it is asked, without what was said before."""
    where = alert.where + (f", rank {alert.rank}" if alert.rank is not None else "")
    if alert.where in alert.title and alert.rank is None:
        where = ""
    said = f"{alert.signal} is {number(alert.value)}"
    limit = "" if alert.limit is None else number(alert.limit)
    known = alert.evidence.startswith(said) and limit in alert.evidence
    facts = [
        ("diagnosis", [alert.diagnosis]),
        ("step", [f"{alert.step} ({alert.rule})"]),
        ("where", [where]),
        ("value", ["" if known else _value(alert)]),
        ("crosses", [_crossing(alert) if alert.steps_to_limit is not None else ""]),
        ("evidence", alert.evidence.split("; ")),
        ("ruled out", list(alert.ruled_out)),
        ("cause", [alert.cause]),
    ]
    told = ((name, [text for text in texts if text]) for name, texts in facts)
    return [(name, texts) for name, texts in told if texts]


def _value(alert: Alert) -> str:
    limit = "" if alert.limit is None else f", limit {number(alert.limit)}"
    return f"{alert.signal} {number(alert.value)}{limit}"


def _crossing(alert: Alert) -> str:
    assert alert.steps_to_limit is not None
    low, mid, high = alert.steps_to_limit
    if mid <= 0:
        return "now"
    text = f"in {in_steps(mid)} ({steps(low)}-{steps(high)})"
    return text if alert.time_to_limit is None else f"{text}, {_times(alert.time_to_limit)}"


def _times(span: Span) -> str:
    """The expected time, and the range in the unit of the largest part of it."""
    low, mid, high = span
    unit, size = next(((name, size) for name, size in reversed(_UNITS) if mid >= size), _UNITS[0])
    return f"{duration(mid)} ({_short(low / size)}-{_short(high / size)} {unit})"


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"


def printable(text: str) -> str:
    """Control characters of a name (line breaks, terminal escapes, text direction) are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        printable(text),
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    ) or [head.rstrip()]
