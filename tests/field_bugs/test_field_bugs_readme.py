"""The table of field bugs names tests that exist, and every file of this folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
ROWS = re.findall(r"^\| (?!elsewhere)(.+) \| `([^`]+)` \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("bug", "test"), ROWS, ids=[bug[:40] for bug, _ in ROWS])
def test_the_named_test_exists(bug: str, test: str) -> None:
    path, _, name = test.partition("::")
    file = ROOT / path if name else FOLDER / path
    functions = {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)}
    assert name in functions if name else any(f.startswith("test_") for f in functions), bug


def test_every_row_was_read_and_every_file_is_named() -> None:
    text = (FOLDER / "README.md").read_text()
    assert len(ROWS) == sum(line.startswith("| ") and "elsewhere" not in line for line in text.splitlines())
    files = {f.name for f in FOLDER.glob("test_*.py")} - {Path(__file__).name}
    assert files == {test for _, test in ROWS if "::" not in test}
