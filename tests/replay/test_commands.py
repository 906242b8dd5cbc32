"""``traindiag replay`` and ``traindiag check``: what they say, and the exit codes that CI goes by."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.replay.test_live_and_replay_agree import train
from traindiag import Settings, Threshold
from traindiag.cli import app
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rules_file import OF_A_RUN, read_rules

QUIET = [1.0, 1.1, 0.9, 1.0] * 10
JUMP = [*QUIET, 20.0, 1.0]


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def csv(folder: Path, norms: list[float], name: str = "m.csv") -> Path:
    file = folder / name
    file.write_text("step,grad_norm\n" + "".join(f"{s},{n}\n" for s, n in enumerate(norms)))
    return file


def rules(folder: Path, text: str) -> Path:
    file = folder / "rules.yaml"
    file.write_text(text)
    return file


USUAL = [r for r in default_rules() if not r.name.startswith(("plasticity/", "stability/"))]
"""The others are on families that a run must ask for."""

LOUD = "default_rules: false\nrules: [{Threshold: {signal: gradient/norm, above: 10, severity: critical}}]"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, lr=0.5, steps=60, every_n_steps=5)
    return folder


def test_a_log_of_ours_in_words(log: Path) -> None:
    code, out, err = call("replay", log)
    assert code == 0 and err == ""
    assert f"60 steps, the last is 59; {len(USUAL)} rules" in out
    assert "the run itself told the same" in out
    assert "WARNING  Attention logits" in out and "what to do" in out
    assert "attention/logit_range" in out.split("signal", 1)[1]
    assert "wiring/replicas_differ: the log has no wiring/replicas_differ" in out


def test_other_rules_are_compared_with_what_the_run_told(log: Path, tmp_path: Path) -> None:
    file = rules(tmp_path, "exclude: [attention/*]\nrules: [{Threshold: {signal: loss/value, above: 0, name: mine}}]")
    code, out, _ = call("replay", log, "--rules", file)
    out = " ".join(out.split())
    assert code == 0
    assert "not told now (attention/" in out and "1 told now only (mine)" in out


def test_json(log: Path) -> None:
    code, out, _ = call("replay", log, "--format", "json")
    data = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    (run,) = data["runs"]
    assert (code, data["schema"], run["steps"], run["last_step"], run["model"]) == (0, 1, 60, 59, "GPT")
    assert run["alerts"] == run["told"] and run["alerts"]
    assert run["unjudged"] == {"wiring/replicas_differ": ["wiring/replicas_differ"]}


def test_guesses_are_shown_and_corrected(tmp_path: Path) -> None:
    file = csv(tmp_path, JUMP)
    out = call("replay", file)[1]
    assert "grad_norm is gradient/norm (guessed)" in out and "--map NAME=SIGNAL" in out
    assert "INFO step 40: Gradient norm jumped" in out
    out = call("replay", file, "--map", "grad_norm=reward/norm")[1]
    assert "grad_norm is reward/norm (given)" in out and "INFO" not in out


@pytest.mark.parametrize(
    ("norms", "arguments", "code", "words"),
    [
        (QUIET, (), 0, "healthy: 3 rules found nothing of severity warning or above in 40 steps"),
        (JUMP, (), 0, "healthy"),
        (JUMP, ("--fail-on", "info"), 1, "1 alert of severity info or above: INFO step 40: Gradient norm jumped"),
        ([*QUIET, float("nan")], ("--fail-on", "critical"), 1, "CRITICAL step 40: The gradient is NaN"),
        ([1.0, float("nan")], (), 1, "CRITICAL step 1"),  # alerts come before a lack of evidence
        (QUIET[:30], (), 4, "not enough evidence: 30 steps were judged, at least 31 are needed"),
        (QUIET[:30], ("--min-steps", 30), 0, "healthy"),
        (
            QUIET,
            ("--map", "grad_norm=reward/norm"),
            4,
            f"of {len(USUAL)} rules only 1 could be judged; the others wait for",
        ),
        (QUIET, ("--fail-on", "nothing"), 2, ""),
    ],
)
def test_exit_codes(tmp_path: Path, norms: list[float], arguments: tuple[Any, ...], code: int, words: str) -> None:
    found = call("check", csv(tmp_path, norms), *arguments)
    assert found[0] == code, found
    assert words in found[1]
    assert len(found[1].splitlines()) == (code != 2)


def test_rules_of_a_file_decide(tmp_path: Path) -> None:
    file = csv(tmp_path, JUMP)
    assert call("check", file, "--rules", rules(tmp_path, LOUD), "--fail-on", "critical")[0] == 1
    assert call("check", file, "--rules", rules(tmp_path, LOUD.replace("10", "30")))[0] == 0


def test_several_runs(tmp_path: Path) -> None:
    csv(tmp_path, QUIET, "a.csv")
    csv(tmp_path, [*QUIET, float("inf")], "b.csv")
    code, out, _ = call("check", tmp_path)
    assert code == 1 and "1 alert of severity warning or above in 1 of 2 runs" in out
    for folder in ("v0", "v1"):  # as loggers call their files
        (tmp_path / folder).mkdir()
        csv(tmp_path / folder, [float("nan")])
    assert "3 alerts of severity warning or above in 3 of 4 runs" in call("check", tmp_path)[1]
    for folder in ("v0", "v1"):
        (tmp_path / folder / "m.csv").unlink()
    csv(tmp_path, QUIET[:5], "b.csv")
    code, out, _ = call("check", tmp_path)
    assert code == 4 and "b.csv: 5 steps" in out


@pytest.mark.parametrize("command", ["replay", "check"])
def test_what_cannot_be_read_and_what_is_wrong(tmp_path: Path, command: str, log: Path) -> None:
    code, out, err = call(command, tmp_path / "nowhere")
    assert (code, out) == (3, "") and err.startswith("unreadable: there is no log at")
    code, _, err = call(command, tmp_path)
    assert code == 3 and "holds no log that can be read" in err
    file = csv(tmp_path, QUIET)
    for arguments, words in (
        (("--map", "grad_nrom=loss/value"), "grad_norm"),
        (("--map", "grad_norm"), "NAME=SIGNAL"),
        (("--rules", tmp_path / "none.yaml"), "none.yaml"),
        (("--rules", rules(tmp_path, "rules: [{Treshold: {signal: a/b}}]")), "Threshold"),
    ):
        code, _, err = call(command, file, *arguments)
        assert code == 2 and words in err.replace("\n", "")
    code, _, err = call(command, log, "--map", "a=loss/value")
    assert code == 2 and "leave out" in err


def test_a_damaged_log_is_read_as_far_as_it_goes_and_says_so(log: Path, tmp_path: Path) -> None:
    (file,) = log.glob("*tfevents*")
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-100])
    code, out, err = call("check", tmp_path)
    assert code == 1 and len(out.splitlines()) == 1
    assert err.startswith("note: ") and "incomplete" in err
    assert "note" in call("replay", tmp_path)[1]


def test_no_damage_is_an_error_of_ours(log: Path, tmp_path: Path) -> None:
    (file,) = log.glob("*tfevents*")
    rng, whole = np.random.default_rng(0), file.read_bytes()
    for _ in range(25):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole) - 20, size=3).tolist():
            damaged[at : at + 8] = rng.bytes(8)
        (tmp_path / file.name).write_bytes(bytes(damaged))
        code, _, err = call("check", tmp_path)
        assert code in (0, 1, 3, 4) and ("note: " in err or code == 3)


def test_the_exit_codes_are_in_the_help() -> None:
    told = " ".join(call("check", "--help")[1].split())
    for words in ("0: healthy", "1: alerts", "2: wrong arguments", "3: no log", "4: not enough evidence"):
        assert words in told


def test_the_settings_file_of_a_run_serves_as_it_is(tmp_path: Path) -> None:
    text = "every_n_steps: 7\nmonitors: [AttentionMonitor]\nexclude: [attention, nonfinite]\n" + LOUD
    file = rules(tmp_path, text.replace("default_rules: false\n", ""))
    names = [rule.name for rule in read_rules(file)]
    assert sorted(names) == sorted(rule.name for rule in Settings.from_yaml(file).build_rules())
    assert {*OF_A_RUN, "rules", "default_rules", "exclude", "severity", "silence"} == {
        f.name for f in fields(Settings)
    }
    with pytest.raises(ValueError, match=r"rules\.yaml:1: rule: unknown key 'rule'.*Did you mean 'rules'"):
        read_rules(rules(tmp_path, "rule: []"))
    with pytest.raises(ValueError, match="Did you mean 'nonfinite'"):
        read_rules(rules(tmp_path, "exclude: [nonfinit]"))
    with pytest.raises(ValueError, match="unique names"):
        read_rules(rules(tmp_path, "rules: [NonFinite]"))
    assert repr(read_rules(rules(tmp_path, LOUD))[0]) == repr(
        Threshold("gradient/norm", above=10, severity="critical")
    )
