"""Importing is free, every public name is there, the house holds, and the README tells the truth."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import traindiag
from traindiag.cli import app, signals_markdown
from traindiag.record.catalogue import SIGNALS
from traindiag.rules.default_pack import described_rules

ROOT = Path(__file__).parents[1]
runner = CliRunner()


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = in_fresh_python("import sys, traindiag; dir(traindiag); print(*sys.modules)").split()
    assert not {"torch", "lightning", "tensorboard", "numpy", "rich"} & set(loaded)


def test_command_line_waits_for_torch() -> None:
    loaded = in_fresh_python("import sys, traindiag.cli; print(*sys.modules)").split()
    assert "typer" in loaded
    assert not {"torch", "lightning", "tensorboard"} & set(loaded)


def test_records_rules_alerts_and_panels_work_without_torch() -> None:
    in_fresh_python(
        "import sys, importlib, pkgutil\n"
        "sys.modules['torch'] = sys.modules['lightning'] = None  # importing them now raises\n"
        "for name in ('record', 'rules', 'alerts', 'panels', 'playback'):\n"
        "    package = importlib.import_module(f'traindiag.{name}')\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
    )


@pytest.mark.parametrize("name", traindiag.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(traindiag, name).__name__ == name
    assert name in dir(traindiag)


def test_unknown_name_is_told_with_a_near_one() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'TrainingDiagnostic'\. Did you mean 'TrainingDiagnostics'"
    ):
        traindiag.TrainingDiagnostic  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'\.$"):
        traindiag.xyzzy  # noqa: B018


def test_version_is_told_once() -> None:
    assert version("traindiag") == traindiag.__version__
    assert runner.invoke(app, ["--version"]).output == f"traindiag {traindiag.__version__}\n"


def test_console_script_is_the_app() -> None:
    (script,) = entry_points(group="console_scripts", name="traindiag")
    assert script.load() is app


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "traindiag", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == f"traindiag {traindiag.__version__}\n"


def test_signals_shows_every_signal_with_formula_and_source() -> None:
    shown = runner.invoke(app, ["signals"], env={"COLUMNS": "200"}).output
    for signal in SIGNALS:
        for part in (signal.name, signal.formula, signal.source):
            assert part in shown
    for described in described_rules():
        for part in (described.rule.name, described.says, described.source):
            assert part in shown


def test_the_table_of_signals_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "signals.md").read_text()
    table = re.search(r"<!-- signals: .*? -->\n(.*?)\n?<!-- end of signals -->", page, re.S)
    assert table is not None
    assert table[1] == signals_markdown(SIGNALS), "run: traindiag signals --markdown"


def test_readme_names_every_signal_with_its_family() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for signal in SIGNALS:
        family, metric = signal.name.split("/")
        assert any(line.startswith(f"| `{family}` |") and f"`{metric}`" in line for line in lines), signal.name


def test_readme_code_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 9
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in ", ".join(re.findall(r"from traindiag import (.*)", block) or ["read"]).split(", "):
            assert name in traindiag.__all__


def test_readme_actions_are_the_same_from_python_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "https://example.org/secret")
    section = (ROOT / "README.md").read_text().split("## Alerts that act")[1].split("\n## ")[0]
    (code,), (text,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.S) for kind in ("python", "yaml"))
    names: dict[str, Any] = {}
    exec(code, names)
    (tmp_path / "diagnostics.yaml").write_text(text)
    read = traindiag.TrainingDiagnostics.from_yaml(tmp_path / "diagnostics.yaml")
    python, file = names["diagnostics"]._settings, read._settings
    assert [vars(action) for action in file.actions] == [vars(action) for action in python.actions]
    assert (file.severity, file.silence) == (python.severity, python.silence)
    assert file.rules[0].where == "blocks.0.*"
    for action in re.findall(r"^\| `(\w+)\(", section, re.M):
        assert action in traindiag.__all__
