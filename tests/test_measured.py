"""Published numbers are those of the committed benchmarks, and those judged today's rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import demo_rl_table
from benchmarks.adaptive_rr import tables as adaptive_rr_tables
from benchmarks.adaptive_rr.train import settings as adaptive_rr_settings
from benchmarks.demo_rl import rules_digest
from benchmarks.demo_rl_table import better_with_more_updates, flagged_before, of_kind, suffers, worst
from benchmarks.early_warning import tables as early_warning
from benchmarks.early_warning.agree import AGREE
from benchmarks.early_warning.alarms import pack_digest
from benchmarks.early_warning.fates import protocol
from benchmarks.early_warning.judge import RESULT, protocol_digest
from benchmarks.early_warning.zoo import zoo
from benchmarks.tables import OVERHEAD, with_tables
from traindiag.demo.rl.run import PRIMING, Settings

ROOT = Path(__file__).parents[1]
LEAD: dict[str, Any] = json.loads((ROOT / "benchmarks/results/demo_lead.json").read_text())
RL: dict[str, Any] = json.loads((ROOT / "benchmarks/results/demo_rl.json").read_text())
UNSTABLE = [r for r in LEAD["runs"] if r["lr"] > 0.05]
HEALTHY = [r for r in LEAD["runs"] if r["lr"] <= 0.05]


def test_the_benchmark_judged_todays_rules() -> None:
    assert pack_digest() == LEAD["rules"], "run python -m benchmarks.demo_lead again"


def test_every_unstable_seed_is_warned_at_least_twenty_steps_before_the_loss_shows_it() -> None:
    assert len(UNSTABLE) == 5
    assert min(r["lead"] for r in UNSTABLE) >= 20


def test_healthy_seeds_are_silent() -> None:
    assert len(HEALTHY) == 5
    assert not any(r["events"].keys() & {"warning", "critical"} for r in HEALTHY)


def test_the_budget_is_kept_where_the_readme_says_so() -> None:
    small, large = json.loads(OVERHEAD.read_text())["results"].values()
    assert large["as it comes"]["mean"] <= 1.02
    assert small["as it comes"]["mean"] < small["every 10th step"]["mean"], "sampling adapts"


def test_tables_of_the_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == with_tables(readme), "run python -m benchmarks.tables"


def test_early_warning_was_judged_with_todays_rules_and_protocol() -> None:
    """Before the first result there is no file; once there is one, it has to be that of what is published."""
    if not RESULT.exists():
        return
    found = json.loads(RESULT.read_text())
    assert found["rules"] == pack_digest(), "judge --split reporting again, with a reason"
    assert found["protocol"] == protocol_digest(), "judge fates and the reporting split again, with a reason"
    assert found["rows"].keys() & {run.row for run in zoo(protocol(), "reporting")}, "this is another split"
    first = [*found["history"], found][0]
    assert first["reason"] == "the first result"


def test_early_warning_live_and_replay_agreed_with_todays_rules() -> None:
    if AGREE.exists():
        found = json.loads(AGREE.read_text())
        assert found["rules"] == pack_digest(), "run python -m benchmarks.early_warning agree"
        assert all(run["same_in_replay"] for run in found["runs"])


def test_tables_and_picture_of_early_warning_are_those_of_the_result() -> None:
    """Without a result they are empty."""
    found = early_warning.result()
    again = "run python -m benchmarks.early_warning tables"
    readme, docs = (ROOT / "README.md").read_text(), early_warning.DOCS.read_text()
    assert readme == early_warning.readme_with(readme, found), again
    assert docs == early_warning.docs_with(docs, found), again
    assert early_warning.PICTURE.exists() == (found is not None), again
    if found is not None:
        assert early_warning.PICTURE.read_text() == early_warning.picture(early_warning.headline(found)), again


def test_readme_quotes_the_benchmark() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    leads, onsets = sorted(r["lead"] for r in UNSTABLE), sorted(r["onset"] for r in UNSTABLE)
    quoted = re.search(r"first attention warning came (\d+) to (\d+) steps before .* \(steps (\d+) to (\d+)\)", text)
    assert quoted is not None
    assert [int(x) for x in quoted.groups()] == [leads[0], leads[-1], onsets[0], onsets[-1]]


def test_rl_demo_was_judged_with_todays_rules() -> None:
    assert RL["rules"] == rules_digest(), "run python -m benchmarks.demo_rl again"


def test_primed_critics_fail_and_are_told_before_it_shows() -> None:
    assert len(of_kind(RL, "primed")) == len(of_kind(RL, "healthy")) == 5
    assert len(suffers(RL)) >= 4
    assert len(flagged_before(RL)) >= 4


def test_healthy_critics_are_not_warned_of() -> None:
    assert [worst(r) for r in of_kind(RL, "healthy")] == ["nothing"] * 5


def test_cartpole_with_many_updates_is_below_critical() -> None:
    runs = of_kind(RL, "cartpole, ratio 4")
    assert runs and better_with_more_updates(RL)
    assert "critical" not in {worst(r) for r in runs}


def test_documents_of_the_rl_benchmarks_are_those_of_the_results() -> None:
    docs = demo_rl_table.DOCS.read_text()
    s, words = Settings(priming=PRIMING), " ".join(docs.split())
    assert (
        f"at environment step {s.primed_at:,} the second critic is trained for {s.priming:,} updates on the" in words
    )
    assert (
        f"first {s.primed_on} transitions, at a learning rate of {s.priming_lr:g} in the place of {s.agent.lr:g}"
        in words
    )
    assert f"for {s.steps - s.primed_at:,} steps and cannot use them" in words
    assert docs == demo_rl_table.docs_with(docs, RL), "run python -m benchmarks.demo_rl tables"
    found = json.loads((ROOT / "benchmarks/results/adaptive_rr.json").read_text())
    docs = adaptive_rr_tables.DOCS.read_text()
    assert docs == adaptive_rr_tables.docs_with(docs, found), "run python -m benchmarks.adaptive_rr tables"
    assert found["settings"] == adaptive_rr_settings(), "run python -m benchmarks.adaptive_rr"
    assert "nowhere is the adaptive ratio better than both fixed ones" in docs
    assert "better than the low one and better than the high one" not in adaptive_rr_tables.verdict(found)
    assert "In all of these runs the FAU keeps 99 % of its first value or rises" in docs
    assert all(min(r["fau"]) >= 0.99 * r["fau"][0] for r in found["runs"])
