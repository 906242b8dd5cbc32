"""A detector whose window is not in the checkpoint is blind after each resume until the window is full again."""

from __future__ import annotations

from tests.field_bugs.pack import rule
from tests.rules.frames import active_at, feed
from tests.rules.series import noise
from tests.rules.test_resume_anywhere import carried


def test_a_jump_in_the_first_step_of_a_resumed_job_is_told() -> None:
    norms = noise("independent", 200, 1, seed=1, sigma=0.2)[:, 0].tolist()
    for name, signal in (("gradient/norm-spike", "gradient/norm"), ("loss/spike", "loss/value")):
        first, second = rule(name), rule(name)
        feed(first, norms, signal)
        second.load_state_dict(carried(first.state_dict()))
        assert active_at(feed(second, [20.0], signal)) == [0]
