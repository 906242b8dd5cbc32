"""When the slow lane samples."""

import math

import pytest
import torch

from traindiag import Diagnostics
from traindiag.engine.schedule import BURST_LENGTH, BURST_SPACING, Schedule


def sampled(schedule: Schedule, start: int, stop: int) -> list[int]:
    return [s for s in range(start, stop) if schedule.due(s)]


def test_burst_samples_every_step_for_a_while_and_then_rests() -> None:
    schedule = Schedule(10)
    assert schedule.open_burst(12)
    assert sampled(schedule, 0, 41) == [0, 10, *range(12, 12 + BURST_LENGTH), 40]
    assert not schedule.open_burst(12 + BURST_SPACING - 1)
    assert schedule.open_burst(12 + BURST_SPACING)


def test_backs_off_above_the_budget_and_relaxes_below_a_quarter_of_it() -> None:
    schedule = Schedule(10, max_overhead=0.02)
    assert schedule.account(0.0, 0.03) and schedule.cadence == 20
    assert not schedule.account(0.0, 0.01) and schedule.cadence == 20
    assert schedule.account(0.0, 0.004) and schedule.cadence == 10
    assert not schedule.account(math.nan, math.nan)
    assert not Schedule(10, None).account(5.0, 5.0)


def test_an_expensive_fast_lane_does_not_stop_sampling() -> None:
    schedule = Schedule(10, max_overhead=0.02)
    slow = 0.04
    while schedule.account(0.5, slow):
        slow /= 2  # what doubling the cadence does to it
    assert schedule.cadence == 80  # 0.005, a quarter of the budget


def test_resumes_in_the_middle_of_a_burst() -> None:
    schedule = Schedule(10, 0.02)
    schedule.account(0.0, 1.0)
    schedule.open_burst(33)
    resumed = Schedule(10, 0.02)
    resumed.load_state_dict(schedule.state_dict())
    assert sampled(resumed, 0, 1200) == sampled(schedule, 0, 1200)
    assert not resumed.open_burst(100)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_refuses_a_cadence_that_is_none(every: object) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps must be a whole number of at least 1, got"):
        Schedule(every)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_refuses_a_budget_that_is_no_share(share: float) -> None:
    with pytest.raises(ValueError, match=f"got {share}"):
        Schedule(10, share)


def test_costly_monitors_of_the_fast_lane_rest_where_every_step_costs_too_much() -> None:
    schedule = Schedule(10, 0.02)
    schedule.account(0.012, 0.001)
    assert schedule.lean
    schedule.account(0.006, 0.001)  # what the others cost: no reason to think that all would fit
    assert schedule.lean
    resumed = Schedule(10, 0.02)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.lean
    resumed.account(0.002, 0.001)
    assert not resumed.lean
    resumed.load_state_dict({"stretch": 1, "burst_from": -500})  # of a checkpoint that is older
    assert not resumed.lean


def test_a_lean_step_leaves_the_sentinels_out() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    diagnostics = Diagnostics(model, optimizer, terminal=False, every_n_steps=5, strict=True)
    diagnostics._schedule.lean = True
    for _ in range(7):
        with diagnostics.step() as step:
            step.loss(model(torch.ones(3, 4)).square().mean()).backward()
            step.gradients()
            optimizer.step()
            optimizer.zero_grad()
    diagnostics.finish()
    assert diagnostics.history["gradient/norm"].steps.tolist() == [*range(7)]
    assert diagnostics.history["optimizer/sentinel_rms_t"].steps.tolist() == [0, 5]
