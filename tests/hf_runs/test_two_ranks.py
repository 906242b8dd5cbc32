"""Two ranks under DistributedDataParallel: the same numbers and verdicts on both; the state is read once for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.ranks import run_on_ranks


def job(rank: int, folder: str) -> dict[str, Any]:
    import warnings

    from tests.hf_runs.run import llama, train
    from traindiag import HFTrainingDiagnostics, Threshold

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, steps, resume in (("first", 6, None), ("second", 10, True)):
        diagnostics = HFTrainingDiagnostics(
            rules=[Threshold("loss/value", above=0.1)],
            every_n_steps=2,
            max_overhead=None,
            terminal=False,
            strict=True,
        )
        trace = train(
            llama(), [diagnostics], Path(folder), steps=steps, resume=resume, save_strategy="steps", save_steps=4,
            gradient_accumulation_steps=2, max_grad_norm=0.05, ddp_backend="gloo",
        )  # fmt: skip
        history = diagnostics.history
        found[name] = {
            "signals": {n: (history[n].steps, history[n].values) for n in history if not n.startswith("logged/")},
            "alerts": [(a.id, a.step, a.value) for a in diagnostics.alerts],
            "logs": [row for row in trace.logs if "loss" in row],
        }
    return found


def test_ranks_agree_and_the_numbers_are_the_trainers(tmp_path: Path) -> None:
    one, other = run_on_ranks(job, str(tmp_path))
    for name, first_step in (("first", 0), ("second", 6)):
        for signal, (steps, values) in one[name]["signals"].items():
            assert steps.tolist() == other[name]["signals"][signal][0].tolist()
            np.testing.assert_array_equal(values, other[name]["signals"][signal][1], err_msg=signal)
        assert one[name]["alerts"] == other[name]["alerts"] != []
        steps, norms = one[name]["signals"]["gradient/norm"]
        assert steps[0] == first_step
        logs = one[name]["logs"][first_step:]
        np.testing.assert_allclose(norms[:, 0], [row["grad_norm"] for row in logs], rtol=1e-5)
        losses = one[name]["signals"]["loss/value"][1]
        np.testing.assert_allclose(losses[:, 0], [row["loss"] for row in logs], rtol=1e-5)
    assert one["first"]["alerts"][0] == one["second"]["alerts"][0]  # the event goes on, under the same id
    assert len(list(tmp_path.rglob("events*"))) == 2  # one a job, written by the first rank
