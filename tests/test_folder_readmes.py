"""READMEs of packages: short, and about the files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "traindiag"
FILES = sorted(PACKAGE.glob("*/README.md"))


@pytest.mark.parametrize("readme", FILES, ids=lambda f: f.parent.name)
def test_names_every_file_and_no_other(readme: Path) -> None:
    text = readme.read_text()
    there = {f.name for f in readme.parent.glob("*.py")} - {"__init__.py"}
    elsewhere = set(re.findall(r"(\w+/\w+\.py)", text))
    assert set(re.findall(r"(?<!/)\b(\w+\.py)", text)) == there
    assert all((PACKAGE / path).exists() for path in elsewhere)
    assert len(text.splitlines()) <= 20


def test_there_are_some() -> None:
    assert {f.parent.name for f in FILES} >= {"capture", "monitors", "transfer"}
