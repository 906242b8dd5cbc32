"""What the zoo holds, and that a run can be killed, resumed and trusted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.early_warning import train as training
from benchmarks.early_warning.__main__ import write_fates
from benchmarks.early_warning.data import IMAGES, batches
from benchmarks.early_warning.fates import Losses, protocol
from benchmarks.early_warning.many import train_all
from benchmarks.early_warning.models import build
from benchmarks.early_warning.zoo import Recipe, Run, zoo
from traindiag.record.log import read_log

ROOT = Path(__file__).parents[2]
PROTOCOL = protocol()
TUNING, REPORTING = (zoo(PROTOCOL, split) for split in ("tuning", "reporting"))
EVERY = [*TUNING, *REPORTING]

TINY = Recipe("gpt", depth=2, width=16, steps=24, batch=2, context=16, text="source", lr=3e-3, warmup=2)


def run_of(recipe: Recipe, name: str = "tiny.control@7", **others: str) -> Run:
    return Run(name, recipe, 7, "tuning", "tuning", name, name.partition("@")[0], **others)


# -- the plan ----------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    assert [n for n, count in Counter(run.name for run in EVERY).items() if count > 1] == []


def test_no_run_is_trained_twice() -> None:
    """Under two names it would count twice."""
    names: dict[object, list[str]] = defaultdict(list)
    for run in EVERY:
        names[run.recipe, run.seed].append(run.name)
    assert [n for n in names.values() if len(n) > 1] == []


def test_splits_share_no_configuration_no_seed_and_so_no_data_order() -> None:
    assert not {r.recipe for r in TUNING} & {r.recipe for r in REPORTING}
    assert not {r.seed for r in TUNING} & {r.seed for r in REPORTING}
    settings: dict[int, set[str]] = defaultdict(set)
    for run in EVERY:
        settings[run.seed].add(run.name.partition(".")[0])
    assert all(len(names) == 1 for names in settings.values())


def test_new_families_are_new() -> None:
    tuned = {r.recipe.family for r in TUNING}
    assert tuned == {"gpt", "mlp", "convnet", "rnn"}
    assert {r.recipe.family for r in REPORTING if r.row == "new families"} == {"llama", "gpt2", "vit"}


def test_every_run_has_its_control_on_the_same_seed_and_every_reference_its_seeds() -> None:
    by_name = {run.name: run for run in EVERY}
    for run in EVERY:
        control = by_name[run.control]
        assert (control.seed, control.recipe.steps) == (run.seed, run.recipe.steps)
        assert control.control == control.name
    references = Counter(run.reference for run in EVERY if run.control == run.name)
    assert min(references.values()) >= PROTOCOL["fate"]["reference_seeds"]


def test_every_cured_twin_differs_from_its_run_by_the_remedy_alone() -> None:
    by_name = {run.name: run for run in EVERY}
    twins = [run for run in EVERY if run.cure]
    assert twins
    for twin in twins:
        run = by_name[str(twin.cure_of)]
        assert (twin.seed, twin.control) == (run.seed, run.control)
        assert twin.recipe == run.recipe.with_changes(PROTOCOL["cure"][str(twin.cure)]["change"])
        assert twin.recipe != run.recipe


def test_every_kind_of_failure_is_in_both_splits() -> None:
    kinds = {"attention_logits", "output_logits", "epsilon", "stale_second_moment", "learning_rate"}
    kinds |= {"activation_growth", "vanishing", "corrupt_batch", "label_flip", "nan", "overflow", "none"}
    assert {r.kind for r in TUNING} == kinds
    assert {r.kind for r in REPORTING} == kinds


# -- models and data ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2", "vit", "convnet", "rnn", "mlp"])
def test_switches_leave_initial_weights_as_they_are(family: str) -> None:
    """A run and its control begin alike: what a fault or a remedy adds draws no numbers."""
    if family in IMAGES:
        pytest.importorskip("sklearn")
    plain = dataclasses.replace(TINY, family=family, steps=1)
    inputs, _ = next(batches(plain, 0))
    weights = []
    for change in ({}, {"qk_norm": True}, {"norm": False}):
        torch.manual_seed(0)
        model = build(dataclasses.replace(plain, **change))
        assert model(inputs).isfinite().all()
        weights.append({tuple(p.flatten()[:4].tolist()) for p in model.parameters() if p.dim() > 1})
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2", "vit"])
def test_normalised_queries_and_keys_change_the_function(family: str) -> None:
    if family in IMAGES:
        pytest.importorskip("sklearn")
    plain = dataclasses.replace(TINY, family=family, steps=1)
    inputs, _ = next(batches(plain, 0))
    out = []
    for qk_norm in (False, True):
        torch.manual_seed(0)
        out.append(build(dataclasses.replace(plain, qk_norm=qk_norm))(inputs))
    assert not torch.allclose(*out)


def test_initial_gain_multiplies_what_stands_between() -> None:
    pytest.importorskip("sklearn")
    inputs, _ = next(batches(dataclasses.replace(TINY, family="mlp"), 0))
    loud = []
    for gain in (1.0, 10.0):
        torch.manual_seed(0)
        model = build(dataclasses.replace(TINY, family="mlp", norm=False, init_gain=gain))
        loud.append(model(inputs).abs().mean())
    assert loud[1] > 20 * loud[0]


def test_batches_follow_the_seed_and_faults_change_their_own_steps_only() -> None:
    plain = list(batches(TINY, 3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, batches(TINY, 3)))
    assert not torch.equal(plain[0][0], next(batches(TINY, 4))[0])
    spoiled = batches(dataclasses.replace(TINY, inject="corrupt_batch", inject_at=5), 3)
    assert [i for i, (a, b) in enumerate(zip(plain, spoiled)) if not torch.equal(a[0], b[0])] == [5]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1]),
        ("jump", [0.5, 1, 9, 9]),
        ("ramp", [0.5, 1, 2.71, 8.14]),
        ("cosine", [0.5, 1, 0.61, 0.1]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    factor = training.schedule(dataclasses.replace(TINY, schedule=schedule), 9.0)
    assert [factor(step) for step in (0, 2, 12, 23)] == pytest.approx(expected, abs=0.02)


def test_a_high_learning_rate_is_that_of_its_part() -> None:
    recipe = dataclasses.replace(TINY, peak_times=30.0, peak_on="attention")
    groups, _ = training._groups(build(recipe), recipe)
    assert sorted((round(g["lr"], 6), len(g["params"])) for g in groups) == [(0.003, 14), (0.09, 2)]


# -- training ----------------------------------------------------------------------------------


def test_a_run_leaves_a_log_of_all_families_and_a_file_of_losses(tmp_path: Path) -> None:
    run = run_of(TINY)
    training.train(run, tmp_path)
    losses = Losses.read(training.losses_of(tmp_path, run.name))
    assert (losses.name, losses.steps, len(losses.losses)) == (run.name, 24, 24)
    log = read_log(training.log_of(tmp_path, run.name))
    assert {name.partition("/")[0] for name in log.history} >= {
        "attention", "output", "gradient", "activation", "optimizer", "loss"
    }  # fmt: skip
    assert log.alerts == ()
    assert log.run.length == 24 and log.run.warmup == 2
    assert log.history["loss/value"].values[:, 0].tolist() == pytest.approx(losses.losses.tolist(), rel=1e-5)


def test_what_measures_changes_no_loss(tmp_path: Path) -> None:
    run = run_of(dataclasses.replace(TINY, update_clip=True, z_loss=1e-4))
    told = []
    for diagnostics in (True, False):
        training.train(run, tmp_path, diagnostics=diagnostics)
        told.append(json.loads(training.losses_of(tmp_path, run.name).read_text())["losses"])
    assert told[0] == told[1]


@pytest.mark.parametrize("fault", ["nan", "overflow"])
def test_a_broken_run_ends_soon(tmp_path: Path, fault: str) -> None:
    run = run_of(dataclasses.replace(TINY, steps=100, inject=fault, inject_at=5))
    training.train(run, tmp_path, diagnostics=False)
    losses = json.loads(training.losses_of(tmp_path, run.name).read_text())["losses"]
    assert losses.index(None) == 6
    assert len(losses) == 6 + training.AFTER_NON_FINITE + 1


def test_a_finished_run_is_not_repeated_but_one_that_was_killed_or_has_another_recipe(tmp_path: Path) -> None:
    first, second = (run_of(dataclasses.replace(TINY, lr=lr), f"tiny.{lr:g}@7") for lr in (1e-3, 2e-3))
    training.train(first, tmp_path, diagnostics=False)
    kept = training.losses_of(tmp_path, first.name)
    before = kept.stat().st_mtime_ns
    (tmp_path / "part" / second.name).mkdir(parents=True)
    (tmp_path / "part" / second.name / "losses.json").write_text("{half")
    assert train_all([first, second], tmp_path, jobs=1, log=False) == 0
    assert kept.stat().st_mtime_ns == before
    assert len(json.loads(training.losses_of(tmp_path, second.name).read_text())["losses"]) == TINY.steps
    assert not any((tmp_path / "part").iterdir())
    changed = dataclasses.replace(first, recipe=second.recipe)
    assert train_all([changed], tmp_path, jobs=1, log=False) == 0
    assert kept.stat().st_mtime_ns != before


def test_a_kill_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(TINY)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_spoil", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, tmp_path)
    assert not training.losses_of(tmp_path, run.name).exists()
    assert not training.log_of(tmp_path, run.name).exists()
    monkeypatch.undo()
    training.train(run, tmp_path)
    assert len(Losses.read(training.losses_of(tmp_path, run.name)).losses) == TINY.steps


def test_a_run_that_fails_to_train_is_counted_and_stops_no_other(tmp_path: Path) -> None:
    bad = run_of(dataclasses.replace(TINY, family="unknown"), "bad@7")
    good = run_of(TINY, "good@7")
    assert train_all([bad, good], tmp_path, jobs=1, log=False) == 1
    assert training.losses_of(tmp_path, "good@7").exists()


def test_fates_are_written_from_the_losses_alone(tmp_path: Path) -> None:
    for seed in range(2):
        training.train(run_of(TINY, f"tiny.control@{seed}"), tmp_path, diagnostics=False)
    write_fates(tmp_path, tmp_path / "fates.json")
    told = json.loads((tmp_path / "fates.json").read_text())["runs"]
    assert set(told) == {"tiny.control@0", "tiny.control@1"}


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, benchmarks.early_warning.zoo; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
