"""What a panel is made of: blocks of plain data that a page, a report or a notebook can show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]
"""A plotly figure as plain data: ``{"data": [...], "layout": {...}}``."""
Block = dict[str, Any]
"""One part of a panel; ``kind`` tells which: figure, table, cards or note."""


@dataclass(frozen=True)
class PanelContent:
    """What one panel shows.

    ``figure`` blocks have ``id``, ``title``, ``note``, ``figure`` and ``controls``: what can be chosen, each with the
    ``option`` that :func:`~traindiag.panels.figures.build` takes, its ``values`` and the present ``value``. ``table``
    blocks have ``id``, ``title``, ``columns`` (``id``, ``title``, ``type``) and ``rows`` by column id. ``cards``
    blocks have ``cards`` (``title``, ``value``, ``state``, ``note``, ``panel``). ``note`` blocks have ``text``. With
    several runs ``run`` says whose block it is.

    Strings in figures are escaped, as plotly takes them for markup; all others are not.

    Args:
        panel: Its id.
        title: Its name.
        blocks: In the order to be shown.
    """

    panel: str
    title: str
    blocks: tuple[Block, ...]

    def figures(self) -> dict[str, Figure]:
        """Its figures by id."""
        return {block["id"]: block["figure"] for block in self.blocks if block["kind"] == "figure"}

    def to_json(self) -> str:
        """Strict JSON, which knows no NaN and no infinity: they become ``"nan"``, ``"inf"`` and ``"-inf"``.

        Figures have no such numbers: there the value is null and a mark says what it was.

        Example:
            >>> PanelContent("a", "A", ({"kind": "table", "rows": [{"value": math.inf}]},)).to_json()
            '{"panel":"a","title":"A","blocks":[{"kind":"table","rows":[{"value":"inf"}]}]}'
        """
        data = {"panel": self.panel, "title": self.title, "blocks": list(self.blocks)}
        try:
            return json.dumps(data, separators=(",", ":"), allow_nan=False)
        except ValueError:
            return json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)


def figure(id: str, title: str, figure: Figure, note: str = "", controls: Sequence[Mapping[str, Any]] = ()) -> Block:
    return {
        "kind": "figure",
        "id": id,
        "title": title,
        "note": note,
        "figure": figure,
        "controls": [dict(c) for c in controls],
    }


def table(id: str, title: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[Mapping[str, Any]]) -> Block:
    """A table; columns are ``(id, title, type)`` with the types text, number, step, severity, list and remedies."""
    named = [{"id": key, "title": name, "type": kind} for key, name, kind in columns]
    return {"kind": "table", "id": id, "title": title, "columns": named, "rows": [dict(row) for row in rows]}


def cards(id: str, title: str, entries: Sequence[Mapping[str, Any]]) -> Block:
    """Small facts in a row, each with ``title``, ``value``, ``state`` and ``note``."""
    return {"kind": "cards", "id": id, "title": title, "cards": [dict(entry) for entry in entries]}


def note(text: str) -> Block:
    return {"kind": "note", "text": text}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
