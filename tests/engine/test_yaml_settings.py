"""Settings from a file: as from Python, wrong ones told with their place, and nothing in a file runs code."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from traindiag import (
    Call,
    Forecast,
    NonFinite,
    Raise,
    SaveCheckpoint,
    Settings,
    StopTraining,
    Threshold,
    TrainingDiagnostics,
    Webhook,
)
from traindiag.engine.yaml_settings import BUILT_IN
from traindiag.rules.rule_set import RuleSet

WHOLE = """
every_n_steps: 2e1          # a float that is a count
max_overhead: 1e-2
watch: [model.*, critic]
exclude: [attention]
default_rules: true
strict: yes
monitors:
  - AttentionMonitor: {rows: 8, limit: 1E5}
rules:
  - Threshold: {signal: attention/max_logit, above: 500, critical_above: 1e4, severity: info}
  - Forecast:
      signal: reward/kl
      limit: 1.5e+3
      horizon: null
  - NonFinite: {name: mine}
"""


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "diagnostics.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def told(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ValueError, match=r"diagnostics\.yaml") as error:
        Settings.from_yaml(written(folder, text))
    return str(error.value).removeprefix(f"{folder}/")


def test_file_says_what_python_says(tmp_path: Path) -> None:
    expected = Settings(
        every_n_steps=20,
        max_overhead=0.01,
        watch=["model.*", "critic"],
        exclude=["attention"],
        strict=True,
        rules=[
            Threshold("attention/max_logit", above=500, critical_above=1e4, severity="info"),
            Forecast("reward/kl", limit=1500.0),
            NonFinite(name="mine"),
        ],
    )
    for read in (Settings.from_yaml, lambda p: TrainingDiagnostics.from_yaml(p)._settings):
        found = read(written(tmp_path, WHOLE))
        assert list(map(repr, found.rules)) == [repr(rule) for rule in expected.rules]
        (monitor,) = found.monitors
        assert (monitor.rows, monitor.limit, monitor.exact) == (8, 1e5, False)
        for field in fields(Settings):
            if field.name not in ("rules", "monitors"):
                assert getattr(found, field.name) == getattr(expected, field.name), field.name


def test_actions_silence_and_severity_are_those_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", "https://example.org/services/secret")
    text = """
silence: {attention/logit-range: trained models of this family begin above it}
severity: {gradient/norm-spike: info}
actions:
  - StopTraining: {severity: critical, clock: fast, diagnosis: "gradient/*", status: [opened]}
  - SaveCheckpoint
  - Raise: {severity: critical}
  - Webhook: {env: HOOK, severity: info, timeout: 2, attempts: 1e1}
"""
    expected = Settings(
        silence={"attention/logit-range": "trained models of this family begin above it"},
        severity={"gradient/norm-spike": "info"},
        actions=[
            StopTraining(severity="critical", clock="fast", diagnosis="gradient/*", status=["opened"]),
            SaveCheckpoint(),
            Raise(severity="critical"),
            Webhook(env="HOOK", severity="info", timeout=2.0, attempts=10),
        ],
    )
    found = Settings.from_yaml(written(tmp_path, text))
    assert (found.silence, found.severity) == (expected.silence, expected.severity)
    for mine, other in zip(found.actions, expected.actions, strict=True):
        assert isinstance(mine, type(other))
        assert vars(mine) == vars(other)
    rules = {rule.name: rule for rule in found.build_rules()}
    assert {rule.name for rule in Settings().build_rules()} - set(rules) == {"attention/logit-range"}
    assert rules["gradient/norm-spike"].told_as == "info" and rules["nonfinite"].told_as is None
    callback = TrainingDiagnostics.from_yaml(written(tmp_path, text))
    assert callback._settings.silence == expected.silence and len(callback._settings.actions) == 4


@pytest.mark.parametrize(
    "action",
    [
        "Webhook: {url: [https://example.org/secret]}",
        "Webhook: https://example.org/secret",
        "Webhook: {url: 'https://example.org/secret', timeout: 0}",
        "Webhook: {url: 'example.org/secret'}",
        "Webhook: {url: 'https://example.org/secret', env: HOOK}",
        "Webhook: {ulr: 'https://example.org/secret'}",
        "Webhook: {severity: 'https://example.org/secret'}",
        "'https://example.org/secret'",
    ],
)
def test_a_secret_in_a_wrong_file_is_not_told(action: str, tmp_path: Path) -> None:
    assert "secret" not in told(tmp_path, f"actions: [{action}]").replace("may hold a secret", "")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_empty_file_is_the_defaults(text: str, tmp_path: Path) -> None:
    if text == "---\n":  # a document that holds null is no empty file
        assert "got nothing" in told(tmp_path, text)
        return
    assert Settings.from_yaml(written(tmp_path, text)) == Settings()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e4", 1e4),
        ("1E5", 1e5),
        ("1e-8", 1e-8),
        ("1.e3", 1e3),
        (".5e2", 50.0),
        ("+2.5e+3", 2500.0),
        ("1_000e1", 1e4),
        ("300", 300),
    ],
)
def test_numbers_as_people_write_them(text: str, number: float, tmp_path: Path) -> None:
    (rule,) = Settings.from_yaml(written(tmp_path, f"rules: [Threshold: {{signal: a/b, above: {text}}}]")).rules
    assert isinstance(rule, Threshold)
    assert rule.above == number


@given(st.floats(1e-30, 1e30), st.sampled_from(["{:e}", "{:.3E}", "{:g}", "{!r}"]))
def test_every_spelling_of_a_float_is_a_number(
    tmp_path_factory: pytest.TempPathFactory, number: float, spelling: str
) -> None:
    text = spelling.format(number)
    file = written(tmp_path_factory.getbasetemp(), f"rules: [Threshold: {{signal: a/b, above: {text}}}]")
    (rule,) = Settings.from_yaml(file).rules
    assert isinstance(rule, Threshold)
    assert rule.above == float(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strict: true\nevry_n_steps: 3", "diagnostics.yaml:2: evry_n_steps: unknown key 'evry_n_steps', expected"),
        ("evry_n_steps: 3", "Did you mean 'every_n_steps'?"),
        ("every_n_steps: ten", ":1: every_n_steps: expected a whole number, got 'ten'"),
        ("every_n_steps: 1.5", "expected a whole number, got 1.5"),
        ("every_n_steps: true", "expected a whole number, got True"),
        ("every_n_steps: 0", "diagnostics.yaml:1: every_n_steps must be a whole number of at least 1, got 0"),
        ("strict: 'no'", "strict: expected true or false, got 'no'"),
        ("strict: 1", "strict: expected true or false, got 1"),
        ("max_overhead: 2%", "max_overhead: expected a number or null, got '2%'"),
        ("exclude: loss", "exclude: expected a list of text, got 'loss'"),
        ("watch: [3]", "watch: expected text or a list of text, got [3]"),
        ("rules:\n", "rules: expected a list, each entry begun with '- ', got nothing"),
        ("rules: {Threshold: {}}", "rules: expected a list"),
        ("rules: [Treshold]", ":1: rules[0].Treshold: unknown name 'Treshold', expected one of Threshold"),
        ("rules: [Treshold]", "Did you mean 'Threshold'"),
        ("rules: [AttentionMonitor]", "unknown name 'AttentionMonitor', expected one of Threshold"),
        ("rules: [[a]]", "rules[0]: expected a name, or a name with its arguments, got ['a']"),
        ("rules:\n- NonFinite: {}\n  name: a", ":2: rules[0]: expected one name with its arguments, got 2 keys"),
        ("rules:\n- NonFinite\n- Threshold: 3", ":3: rules[1].Threshold: expected keys with values, got 3"),
        ("rules: [Threshold]", "rules[0].Threshold: lacks signal"),
        ("rules: [Threshold: {above: 1}]", "rules[0].Threshold: lacks signal"),
        (
            "rules:\n- Threshold:\n    signal: a/b\n    abov: 4",
            "diagnostics.yaml:4: rules[0].Threshold.abov: unknown key 'abov'",
        ),
        ("rules: [Threshold: {signal: a/b, above: '5'}]", "Threshold.above: expected a number or null, got '5'"),
        ("rules: [Threshold: {signal: a/b, above: 5, severity: bad}]", "expected one of info, warning, critical"),
        ("rules:\n- Threshold: {signal: a/b}", ":2: rules[0].Threshold: Threshold('a/b') needs a limit"),
        ("rules: [Threshold: {signal: attention/max_logits, above: 1}]", "Did you mean 'attention/max_logit' or"),
        ("monitors: [AttentionMonitor: {rows: 0}]", "monitors[0].AttentionMonitor: rows must be at least 1, got 0"),
        ("monitors: [LossMonitor, LossMonitor]", "two monitors are called 'loss'"),
        (
            "actions: [os.system]",
            "unknown name 'os.system', expected one of StopTraining, SaveCheckpoint, Call",
        ),
        ("actions: [StopTrainin]", "Did you mean 'StopTraining'?"),
        (
            "actions:\n- StopTraining:\n    severity: critcal",
            ":3: actions[0].StopTraining.severity: expected one of info, warning, critical, got 'critcal'. Did you "
            "mean 'critical'?",
        ),
        ("actions: [StopTraining: {clok: fast}]", "unknown key 'clok', expected one of severity, clock, diagnosis"),
        ("actions: [Raise: {clock: soon}]", "Raise.clock: expected one of fast, slow or null, got 'soon'"),
        ("actions: [Raise: {status: opened}]", "Raise.status: expected a list of one of opened, escalated, closed"),
        (
            "actions: [Raise: {status: []}]",
            ":1: actions[0].Raise: status must name at least one of opened",
        ),
        (
            "actions:\n- Raise\n- SaveCheckpoint: {status: [closed]}",
            ":3: actions[1].SaveCheckpoint: SaveCheckpoint",
        ),
        ("actions: [SaveCheckpoint: {save: os.remove}]", "SaveCheckpoint.save: unknown key 'save'"),
        ("actions: [Call]", "actions[0].Call: lacks function"),
        (
            "actions: [Call: {function: os.system}]",
            "Call: no installed package offers a function 'os.system'",
        ),
        ("actions: [Webhook]", "Webhook: Webhook needs either url= or env="),
        ("actions: [Webhook: {env: NO_SUCH_VARIABLE}]", "the environment variable 'NO_SUCH_VARIABLE' is not set"),
        (
            "strict: true\nsilence:\n  loss: too loud\n  gradient/norm-spke: too loud",
            "diagnostics.yaml:3: silence.loss: no default rule is called 'loss'.",
        ),
        ("silence:\n  gradient/norm-spke: too loud", ":2: silence.gradient/norm-spke: no default rule is called"),
        ("silence:\n  gradient/norm-spke: too loud", "Did you mean 'gradient/norm-spike'"),
        ("silence:\n  gradient/norm-spike:", ":2: silence.gradient/norm-spike: expected text, got nothing"),
        (
            "silence:\n  gradient/norm-spike: ' '",
            ":2: silence.gradient/norm-spike: expected the reason, in words",
        ),
        ("silence: [nonfinite]", ":1: silence: expected names with text, got ['nonfinite']"),
        (
            "severity:\n  nonfinite: warn",
            ":2: severity.nonfinite: expected one of info, warning, critical",
        ),
        ("severity:\n  nonfinit: info", ":2: severity.nonfinit: no default rule is called 'nonfinit'. Did you mean"),
        ("strict: true\nstrict: false", "diagnostics.yaml:2: 'strict' is given twice"),
        ("- strict", ":1: expected keys with values, got ['strict']"),
        ("a: [", ":1: "),
        ("a: 1\n---\nb: 1", "another document"),
        ("1: 2", "expected a name as key, got 1"),
        ("? [a]\n: 3", "expected a name as key, got ['a']"),
        ("watch: 2001-13-45", "watch: cannot be read: month must be in 1..12"),
        ("=: 3", ":1: cannot be read"),
    ],
)
def test_wrong_file_is_told_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    assert message in told(tmp_path, text)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Settings.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "strict: !!python/object/apply:pathlib.Path.touch [{mark}]",
        "!!python/object/new:pathlib.Path [{mark}]",
        "rules: [!!python/name:traindiag.Threshold ]",
        "rules: [pathlib.Path.touch: {{self: {mark}}}]",
        "rules: [traindiag.rules.threshold.Threshold: {{signal: a/b, above: 1}}]",
        "actions: [builtins.exec]",
        "exclude: !!int x",
        "exclude: &a [*a]",
        "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]",
        "<<: {{strict: true}}",
        "[" * 3000,
        "every_n_steps: " + "9" * 5000,
        b"\x00\xff",
        b"\xfe\xff\xd8",
    ],
)
def test_hostile_file_is_refused_and_runs_nothing(text: str | bytes, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    before = set(sys.modules)
    told(tmp_path, text.format(mark=mark) if isinstance(text, str) else text)
    assert not mark.exists()
    assert not {name for name in set(sys.modules) - before if not name.startswith(("yaml", "encodings"))}


def test_loader_for_everyone_else_stays_as_it_was() -> None:
    assert yaml.safe_load("1e4") == "1e4"
    assert yaml.safe_load("[&a 1, *a]") == [1, 1]


PLUGIN = """
from traindiag import Threshold

loaded = True
told = []

class Strict(Threshold):
    def __init__(self, limit: float, unknown: "Nowhere" = None):
        super().__init__("loss/value", above=limit, name="strict")

def remember(alert): told.append(alert)

def sender(*, address: str): return lambda alert: told.append((address, alert))
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that offers a rule, an action and a maker of actions."""
    name = "a_plugin_of_ours"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[traindiag.plugins]\nStrict = {name}:Strict\nremember = {name}:remember\nsender = {name}:sender\n"
        "broken = a_module_that_is_not_there:thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_installed_packages_offer_names(plugin: str, tmp_path: Path) -> None:
    Settings.from_yaml(written(tmp_path, "strict: true"))
    assert plugin not in sys.modules  # what a file does not name is not loaded, broken or not
    settings = Settings.from_yaml(
        written(tmp_path, "rules: [Strict: {limit: 1e1}]\nactions: [remember, sender: {address: here}]")
    )
    assert settings.rules[0].name == "strict"
    for action in settings.actions:
        action("alert")  # type: ignore[arg-type]
    assert sys.modules[plugin].told == ["alert", ("here", "alert")]
    (call,) = Settings.from_yaml(
        written(tmp_path, "actions: [Call: {function: remember, severity: critical, diagnosis: 'attention/*'}]")
    ).actions
    assert isinstance(call, Call) and call.function is sys.modules[plugin].remember
    assert (call.severity, call.diagnosis) == ("critical", "attention/*")
    assert "Did you mean 'remember'?" in told(tmp_path, "actions: [Call: {function: remembr}]")
    assert "actions[0].sender: lacks address" in told(tmp_path, "actions: [sender: {}]")
    assert "Did you mean 'Strict'?" in told(tmp_path, "rules: [Strickt]")
    assert "rules must hold Rule objects" in told(tmp_path, "rules: [remember]")


def test_every_default_rule_can_be_written_down(tmp_path: Path) -> None:
    """Leaving the pack out and writing it by hand gives the same rules, by the digest that benchmarks use."""
    defaults = Settings().build_rules()
    by_hand = [{type(r).__name__: r.settings()} for r in defaults]
    assert {next(iter(entry)) for entry in by_hand} <= set(BUILT_IN["rules"])
    file = written(tmp_path, yaml.safe_dump({"default_rules": False, "rules": by_hand}))
    assert RuleSet(Settings.from_yaml(file).build_rules()).digest() == RuleSet(defaults).digest()
