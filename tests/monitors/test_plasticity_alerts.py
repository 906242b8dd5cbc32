"""From forward passes to alerts: a critic that loses its units is told by name, live, resumed and from the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.monitors.test_critic_plasticity import agent, learn
from tests.ranks import run_on_ranks
from tests.replay.test_live_and_replay_agree import same
from traindiag import Alert, CriticPlasticity, Diagnostics


def lose(
    diagnostics: Diagnostics, model: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    """At step 40 the biases of most hidden units fall below all of their inputs."""
    for step in steps:
        with diagnostics.step() as s:
            if step == 40:
                with torch.no_grad():
                    for at in (0, 2):
                        model["critic"].body[at].bias[:24] -= 5.0
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            s.loss((model["critic"](x) - x.sum(1, keepdim=True)).square().mean()).backward()
            s.gradients()
            optimizer.step()
            optimizer.zero_grad()


def run(folder: Path | None = None, cut: int | None = None) -> list[Alert]:
    model = agent()
    optimizer = torch.optim.SGD(model["critic"].parameters(), lr=1e-3)

    def begun() -> Diagnostics:
        monitor = CriticPlasticity("critic", gamma=0.5, reward_bound=1e3, every=16, states=128)
        return Diagnostics(
            model, optimizer, folder, monitors=[monitor], terminal=False, strict=True, max_overhead=None,
            default_monitors=False,
        )  # fmt: skip

    diagnostics = begun()
    lose(diagnostics, model, optimizer, range(cut or 200))
    if cut is not None:
        state = diagnostics.state_dict()
        diagnostics.finish()
        diagnostics = begun()
        diagnostics.load_state_dict(state)
        lose(diagnostics, model, optimizer, range(cut, 200))
    diagnostics.finish()
    return diagnostics.alerts


def test_lost_units_are_told_by_name_and_the_log_tells_the_same(tmp_path: Path) -> None:
    alerts = run(tmp_path)
    first, second = alerts
    assert {a.diagnosis for a in alerts} == {"loss of plasticity"} and first.id == second.id
    assert (first.status, first.severity) == ("opened", "info")  # one sign of the panel, in three looks
    assert (second.status, second.severity) == ("escalated", "warning")
    assert second.where == "critic" and second.step <= 40 + 16 * 6
    same(alerts, tmp_path)


def test_a_resumed_run_is_told_the_same() -> None:
    whole = [(a.status, a.severity, a.step, a.diagnosis) for a in run()]
    assert [(a.status, a.severity, a.step, a.diagnosis) for a in run(cut=75)] == whole


def test_a_critic_that_keeps_its_units_is_left_alone_but_for_a_note() -> None:
    monitor = CriticPlasticity("critic", gamma=0.5, reward_bound=1e3, every=16, states=128)
    model = agent()
    optimizer = torch.optim.SGD(model["critic"].parameters(), lr=1e-3)
    diagnostics = learn(model, monitor, 200, optimizer=optimizer, default_monitors=False)
    assert diagnostics is not None
    diagnostics.finish()
    assert [(a.diagnosis, a.severity) for a in diagnostics.alerts] == [("plasticity kept", "info")]


def on_rank(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(agent()["critic"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    monitor = CriticPlasticity("Modules", gamma=0.9, reward_bound=1.0, every=20, states=128)
    diagnostics = Diagnostics(model, optimizer, terminal=False, strict=True, max_overhead=None, monitors=[monitor])
    for step in range(45):
        with diagnostics.step():
            x = torch.randn(8 + rank, 4, generator=torch.Generator().manual_seed(1000 * rank + step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    history = diagnostics.history
    kept = monitor.state_dict()["modules"]["Modules"]["fixed"]["args"][0]
    found = {n: history[n].values.tolist() for n in history if n.startswith("plasticity/")}
    return {"found": found, "steps": history["plasticity/fau"].steps.tolist(), "states": kept}


def test_two_ranks_look_at_states_of_their_own_and_read_the_same_numbers() -> None:
    first, second = run_on_ranks(on_rank)
    assert not torch.equal(first["states"], second["states"])
    assert first["steps"] == second["steps"] == [15, 19, 39]
    assert first["found"] == second["found"] and len(first["found"]) > 15
    assert first["found"]["plasticity/updates"][-1] == [40.0]
