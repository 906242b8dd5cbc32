"""Writes the tables of the README that come from benchmark results.

python -m benchmarks.tables            # rewrites what stands between the markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OVERHEAD = ROOT / "benchmarks" / "results" / "overhead.json"


def overhead_table(found: dict[str, Any]) -> str:
    """One row a variant, one column a model: what the step time grows by, with its standard error."""
    models = list(found["results"])
    variants = list(dict.fromkeys(v for m in models for v in found["results"][m]))
    lines = [
        "| " + " | ".join(["step time with it", *models]) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for variant in variants:
        cells = [_percent(found["results"][m].get(variant)) for m in models]
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines)


def _percent(measured: dict[str, float] | None) -> str:
    if measured is None:
        return ""
    return f"{100 * (measured['mean'] - 1):+.1f} ± {100 * measured['error']:.1f} %"


def with_tables(readme: str) -> str:
    """``readme`` with its generated tables brought up to date."""
    table = overhead_table(json.loads(OVERHEAD.read_text()))
    return between(readme, "overhead", table)


def between(text: str, name: str, table: str) -> str:
    r"""``text`` with ``table`` between the markers of that name.

    Raises:
        ValueError: If they are not there just once.

    Example:
        >>> between("<!-- a: how -->\nold\n<!-- end of a -->", "a", "new")
        '<!-- a: how -->\nnew\n<!-- end of a -->'
    """
    found, count = re.subn(
        rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)",
        lambda match: match.group(1) + (table + "\n" if table else "") + match.group(2),
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"expected one place marked {name!r}, found {count}")
    return found


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
