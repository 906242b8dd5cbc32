"""The report of a run that has just ended: beside its log, and as an artifact where Weights & Biases is in use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from traindiag.panels.report.page import html_page
from traindiag.panels.report.story import Report, reported
from traindiag.record.event_file import event_files
from traindiag.record.log import read_log

FILE = "report.html"


def write_report(folder: str | os.PathLike[str], run: str) -> Path:
    """Writes ``report.html`` into ``folder``.

    Args:
        folder: Where alerts are written; the log lies there too, or in the folder above.
        run: Id of the run.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
        ValueError: If the log of the run is not there.
        OSError: If the file cannot be written.
    """
    target = Path(folder)
    here = target if target.exists() and any(event_files(target)) else target.parent
    log = read_log(here, run)
    name = (target.parent if target.name == "traindiag" else target).resolve().name
    page = html_page(Report((reported(name, log, str(here)),)))
    target.mkdir(parents=True, exist_ok=True)
    file = target / FILE
    file.write_text(page, "utf-8")
    return file


def hand_to_wandb(file: Path, run: str) -> bool:
    """Logs the report as an artifact of the W&B run that is under way; whether there was one.

    W&B is never imported here: where nobody has, there is no run.
    """
    wandb = sys.modules.get("wandb")
    current = getattr(wandb, "run", None)
    if wandb is None or current is None:
        return False
    artifact = wandb.Artifact(f"traindiag-report-{run}", type="report")
    artifact.add_file(str(file), name=FILE)
    current.log_artifact(artifact)
    return True
