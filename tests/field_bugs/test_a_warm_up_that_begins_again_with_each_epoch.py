"""Lightning's SpikeDetection counts its warm-up in batches of the epoch: in short epochs it never comes to judge."""

from __future__ import annotations

from tests.lightning_runs.run import fit
from tests.lightning_runs.test_injected_faults import Inject
from traindiag import TrainingDiagnostics


def test_a_jump_in_the_first_batches_of_an_epoch_is_told() -> None:
    diagnostics = TrainingDiagnostics(terminal=False)
    fit([Inject(31, "tenfold"), diagnostics], steps=45, validation=False, limit_train_batches=15)
    assert [a.step for a in diagnostics.alerts if a.rule == "gradient/norm-spike"][:1] == [31]
