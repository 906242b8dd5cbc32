"""From stored runs to what is published, and that no result of the reporting split is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.early_warning import __main__ as command
from benchmarks.early_warning import judge as judging
from benchmarks.early_warning import tables
from benchmarks.early_warning.agree import live_and_replayed, some, timeless
from benchmarks.early_warning.fates import protocol
from benchmarks.early_warning.judge import ALL_ROWS, hot_runs, judge_runs, protocol_digest, publish, read_fates
from benchmarks.early_warning.seen import Seen
from benchmarks.early_warning.zoo import Recipe, Run, zoo
from tests.early_warning.test_contest import scores
from tests.early_warning.test_score import NAMES, alarm, fate

RECIPE = Recipe("gpt", depth=2, width=16, steps=1000, batch=2, context=16, text="source", lr=3e-3, warmup=2)


def run(name: str, row: str, times: float = 1.0, **other: Any) -> Run:
    recipe = dataclasses.replace(RECIPE, peak_times=times)
    return Run(name, recipe, 7, "reporting", row, name, name.partition("@")[0], **other)


PLAN = [
    run("gpt.control@1", "new seeds"),
    run("gpt.hot@1", "new seeds", 4.0),
    run("gpt.lr@1", "new seeds", 10.0, kind="learning_rate"),
    run("vit.control@1", "new families"),
    run("vit.lr@1", "new families", 10.0, kind="learning_rate"),
    run("vit.nan@1", "new families", kind="nan"),
]
FATES = {
    r.name: fate(
        "degraded" if ".lr" in r.name else "healthy", configuration=r.configuration, recipe=r.recipe.digest()
    )
    for r in PLAN
}
FATES["vit.nan@1"] |= {"injected_at": 200, "kind": "nan"}


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def seen(plan: list[Run], folder: Path, jobs: int) -> dict[str, Seen]:
        told = {"gpt.lr@1": [alarm(300)], "vit.nan@1": [alarm(201, diagnosis=NAMES["fault"]["nan"][0])]}
        return {r.name: Seen(told.get(r.name, []), {"loss alone": scores(0.1, 0.2)}) for r in plan}

    monkeypatch.setattr(judging, "look_at_all", seen)
    return judge_runs(PLAN, PLAN, Path(), FATES, 1)


def test_rows_are_judged_apart(result: dict[str, Any]) -> None:
    assert result["rows"].keys() == {"new seeds", "new families", ALL_ROWS}
    seeds, families = result["rows"]["new seeds"], result["rows"]["new families"]
    assert seeds["slow"]["all"]["material"]["recall"] == 1
    assert families["slow"]["all"]["material"]["recall"] == 0
    assert (families["injected"]["nan"]["named"], seeds["injected"]) == (1, {})
    assert seeds["healthy"]["hot"]["runs"] == 1


def test_hot_is_within_a_factor_of_the_lowest_that_failed_in_the_setting() -> None:
    assert hot_runs(PLAN, FATES) == {"gpt.hot@1"}
    assert hot_runs(PLAN, FATES | {"gpt.lr@1": fate("grey")}) == set()


def test_runs_without_a_fate_or_of_another_recipe_are_not_judged(result: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 runs have no fate"):
        judge_runs(PLAN, PLAN, Path(), {n: f for n, f in FATES.items() if n != "vit.nan@1"}, 1)
    with pytest.raises(ValueError, match="another recipe"):
        judge_runs(PLAN, PLAN, Path(), FATES | {"gpt.hot@1": fate(recipe="old")}, 1)


def test_fates_of_another_protocol_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fates.json"
    path.write_text(json.dumps({"protocol": "old", "runs": {}}))
    with pytest.raises(ValueError, match="another protocol"):
        read_fates(path)
    path.write_text(json.dumps({"protocol": protocol_digest(), "runs": {"a": fate()}}))
    assert read_fates(path)["a"]["fate"] == "healthy"


def test_the_first_result_stays_and_another_needs_a_reason(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "early_warning.json"
    publish(result, path, None)
    first = json.loads(path.read_text())
    assert (first["reason"], first["history"]) == ("the first result", [])
    with pytest.raises(ValueError, match="--reason"):
        publish(result, path, None)
    assert json.loads(path.read_text()) == first
    for reason in ("a defect of the rule", "another one"):
        publish(result, path, reason)
    last = json.loads(path.read_text())
    assert [r["reason"] for r in last["history"]] == ["the first result", "a defect of the rule"]
    assert last["history"][0] == {k: v for k, v in first.items() if k != "history"}
    assert "| 3 |" in tables.made_with(last)


def test_one_command_judges_and_publishes(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "early_warning.json"
    plan = {"reporting": PLAN, "tuning": [dataclasses.replace(r, split="tuning") for r in PLAN]}
    monkeypatch.setattr(command, "RESULT", path)
    monkeypatch.setattr(command, "zoo", lambda constants, split: plan[split])
    (tmp_path / "fates.json").write_text(json.dumps({"protocol": protocol_digest(), "runs": FATES}))
    folder = ["--folder", str(tmp_path)]
    assert command.main(["judge", "--split", "tuning", *folder]) == 0
    assert not path.exists(), "what was tuned on is not published as a result"
    assert (tmp_path / "judged_tuning.json").exists()
    assert command.main(["judge", "--split", "reporting", "--row", "new families", *folder]) == 0
    assert json.loads(path.read_text())["rows"].keys() == {"new families"}
    with pytest.raises(SystemExit):
        command.main(["judge", "--split", "reporting", *folder])
    assert command.main(["judge", "--split", "reporting", "--reason", "the other row", *folder]) == 0
    assert [r["rows"].keys() for r in json.loads(path.read_text())["history"]] == [{"new families"}]
    assert "new seeds" in capsys.readouterr().out


# -- tables ------------------------------------------------------------------------------------


@pytest.fixture
def found(result: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "early_warning.json"
    publish(result, path, None)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def cells(table: str, *starts: str) -> list[str]:
    (line,) = [x for x in table.splitlines() if x.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_headline_comes_first_and_all_rows_are_not_a_row_of_leads(found: dict[str, Any]) -> None:
    slow = tables.ahead_table(found, "slow")
    assert [line.split(" | ")[0] for line in slow.splitlines()[2:]] == ["| new families"] * 2 + ["| new seeds"] * 2
    seeds = cells(slow, "new seeds", "learning rate")
    assert seeds[2:5] == ["1", "1 (100%, 2% to 100%)", "1 (100%, 2% to 100%)"]
    assert seeds[6:9] == ["300 steps, 30% of the run", "0.50", "0.25"]
    assert cells(slow, "new families", "learning rate")[6:9] == ["", "0.00", "0.00"]


def test_every_table_has_as_many_cells_as_its_head(found: dict[str, Any]) -> None:
    document = tables.docs_with(tables.DOCS.read_text(), found) + tables.readme_with(
        (tables.ROOT / "README.md").read_text(), found
    )
    blocks = [b.splitlines() for b in document.split("\n\n") if "|---" in b]
    assert len(blocks) > 8
    for block in blocks:
        rows = [line for line in block if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) == 1, rows[0]


def test_tables_are_written_once_and_taken_away_without_a_result(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "AGREE", tmp_path / "none.json")
    docs = tables.docs_with(tables.DOCS.read_text(), found)
    assert tables.docs_with(docs, found) == docs
    assert tables.PICTURE.name in docs
    empty = tables.docs_with(docs, None)
    assert not any(line.startswith("|") for line in empty.splitlines())
    assert tables.docs_with(empty, found) == docs


def test_the_picture_draws_one_curve_a_clock_and_onset(found: dict[str, Any]) -> None:
    drawn = tables.picture(tables.headline(found))
    assert drawn.count('stroke-width="2"') == 2 * 2  # a curve and its legend, of the slow clock alone
    assert "slow, strict onset: 1 runs" in drawn
    assert "fast" not in drawn


# -- live and replay ---------------------------------------------------------------------------


def test_a_run_is_told_live_what_its_replay_tells(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=40, inject="nan", inject_at=20)
    live, replayed = live_and_replayed(Run("nan@7", recipe, 7, "tuning", "tuning", "nan@7", "nan"), tmp_path)
    assert any(a.kind == "nonfinite" and a.step == 20 for a in live)
    assert timeless(live) == timeless(replayed)
    later = [dataclasses.replace(a, step=a.step + 1) for a in replayed]
    assert timeless(live) != timeless(later)


def test_those_compared_are_of_many_kinds() -> None:
    picked = some(zoo(protocol(), "tuning"))
    assert len(picked) == 10 == len({r.kind for r in picked})
