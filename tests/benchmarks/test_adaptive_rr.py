"""The controller's experiment: resumable, its FAU that of the loss, its table that of the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.adaptive_rr import __main__ as experiment
from benchmarks.adaptive_rr import tables
from benchmarks.adaptive_rr import train as training
from benchmarks.adaptive_rr.train import ARMS, STEPS, ActiveUnits, controller, settings


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, int]]:
    """Runs as they are asked for; the fifth is cut off."""
    done: list[tuple[str, str, int]] = []

    def train(task: str, arm: str, seed: int) -> dict[str, Any]:
        done.append((task, arm, seed))
        if len(done) == 5:
            raise KeyboardInterrupt
        return {"last": 1.0, "updates": 2, "switched_at": None, "cpu_seconds": 0.0, "returns": [], "fau": []}

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "RESULT", tmp_path / "found.json")
    monkeypatch.setattr(experiment, "write_tables", lambda result: None)
    return done


def test_a_killed_experiment_goes_on_where_it_stopped(trained: list[tuple[str, str, int]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        experiment.main([])
    kept = json.loads(experiment.RESULT.read_text())["runs"]
    assert [(r["task"], r["arm"], r["seed"]) for r in kept] == trained[:4]
    assert experiment.main([]) == 0
    runs = json.loads(experiment.RESULT.read_text())["runs"]
    assert len(runs) == len(experiment.SEEDS) * len(STEPS) * len(ARMS)
    assert trained[5] == trained[4], "the one that was cut off"
    assert len(trained) == len(runs) + 1, "no other twice"


def test_runs_of_other_settings_are_not_mixed_in(
    trained: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        experiment.main([])
    monkeypatch.setattr(training, "INTERVALS", 10)
    experiment.main([])
    found = json.loads(experiment.RESULT.read_text())
    assert found["settings"]["intervals"] == 10
    assert len(trained) == 5 + len(found["runs"])


def test_active_units_are_those_of_the_passes_with_gradients() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2))
    active = ActiveUnits(critic)
    states = torch.randn(6, 3)
    with torch.no_grad():
        critic(torch.randn(50, 3))  # the target's and the acting pass do not count
    critic(states)
    weights = [p.detach().double().numpy() for p in critic.parameters()]
    first = np.maximum(states.double().numpy() @ weights[0].T + weights[1], 0)
    second = np.maximum(first @ weights[2].T + weights[3], 0)
    assert active.take() == pytest.approx(((first > 0).sum() + (second > 0).sum()) / (6 * 14))
    critic(-states)
    assert active.take() != pytest.approx(((first > 0).sum() + (second > 0).sum()) / (6 * 14)), "begins anew"


def test_fixed_arms_have_nowhere_to_go() -> None:
    for arm, ratio in (("low", {0.5}), ("high", {2.0}), ("adaptive", {0.5, 2.0})):
        pace = controller(arm, steps=400)
        seen = {pace.update(0.5, env_step=step // 40) for step in range(4000)}
        assert seen == ratio


def test_a_run_does_the_updates_of_its_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", {"CartPole-v1": 560})
    low, high = (training.train("CartPole-v1", arm, seed=0) for arm in ("low", "high"))
    assert (low["updates"], high["updates"]) == (30, 120)
    assert low["returns"][:10] == high["returns"][:10], "the random steps are the same"
    assert 0.2 < low["fau"][0] < 0.8


def test_table_says_what_the_numbers_say() -> None:
    last = {"low": (100.0, 110.0), "high": (50.0, 90.0), "adaptive": (120.0, 130.0)}
    runs = [
        {"task": "CartPole-v1", "arm": arm, "seed": seed, "last": value, "updates": 10, "cpu_seconds": 60.0,
         "switched_at": [None, 1200][seed] if arm == "adaptive" else None}
        for arm, values in last.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    found = {"settings": {**settings(), "steps": {"CartPole-v1": 6000}}, "runs": runs}
    rows = tables.table(found).splitlines()
    assert rows[2].startswith("| CartPole | low, 0.5 | 2 | 105 (100 to 110) |  | +35 (+20 to +50) | 10 |  |")
    assert rows[4] == (
        "| CartPole | adaptive, 0.5 to 2 | 2 | 125 (120 to 130) | +20 (+20 to +20) | +55 (+40 to +70) | 10 "
        "| 1,200; 1 never |"
    )
    assert (
        tables.verdict(found)
        == "CartPole: the adaptive ratio is better than the low one and better than the high one."
    )
    runs[5]["last"] = 60.0
    assert "not to be told from the low one" in tables.verdict(found)
