"""Alerts and coverage as Markdown, for TensorBoard's text page."""

from __future__ import annotations

from collections.abc import Sequence

from traindiag.alerts.alert import Alert
from traindiag.alerts.text import escape, markdown
from traindiag.record.coverage import Coverage


def alerts_markdown(alerts: Sequence[Alert]) -> str:
    """The alerts of one step, newest first, as the page orders its steps."""
    return "\n\n---\n\n".join(markdown(a) for a in reversed(alerts))


def coverage_markdown(table: Sequence[Coverage]) -> str:
    """A list of what is seen; TensorBoard breaks the words of a table's narrow columns.

    Example:
        >>> print(coverage_markdown([Coverage("output", "unseen", ("head",), "fused loss")]))
        - **output** unseen, 1: head (fused loss)
    """
    return "\n".join(
        f"- **{row.family}** {row.sight}, {len(row.places)}: {_shortened(row.places)}"
        + (f" ({escape(row.reason)})" if row.reason else "")
        for row in table
    )


def _shortened(names: Sequence[str]) -> str:
    return escape(", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]]))
