"""Where to look in a stock TensorBoard: the custom-scalars layout, the pinned cards and the command to open it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

CATEGORY = "Training diagnostics (1)"
"""Layouts of all runs are merged by this title: a released chart never changes, the number does."""

_EACH = r"(/[^/]+)?$"  # with several optimizers each has its tag
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Largest attention logit", (r"diag_attention/max_logit$", r"diag_attention/max_logit_median$")),
    ("Attention logit range", (r"diag_attention/logit_range_max$",)),
    ("Attention entropy", (r"diag_attention/entropy_min$", r"diag_attention/entropy_median$")),
    ("Log Z of the output logits", (r"diag_output/log_z" + _EACH,)),
    ("Gradient norm", (r"diag_gradient/norm(_applied)?(_max)?" + _EACH,)),
    ("Loss", (r"diag_loss/value" + _EACH,)),
    ("Open alerts (1 warning, 2 critical)", (r"diag_alerts/severity$",)),
)
_OF_FAMILIES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "plasticity": (
        ("Active units of a critic", (r"diag_plasticity/fau_(pooled|fresh)_min$",)),
        ("Largest value, against any return", (r"diag_plasticity/q_bound_ratio_max$",)),
    ),
    "stability": (
        ("Old tasks: depth of the gap", (r"diag_stability/gap_depth_max$", r"diag_stability/gap_residual_max$")),
        ("Old tasks: loss or metric", (r"diag_stability/(loss|value)_(max|min)$",)),
    ),
}
"""Charts for runs that measure them; in others they would be empty."""
PINNED = ("diag_attention/max_logit", "diag_gradient/norm", "diag_loss/value", "diag_alerts/severity")


def layout_summary(families: Collection[str] = ()) -> Summary:
    """Summary of our category. A run keeps the last layout written into it, so a user's own replaces this one.

    Args:
        families: Families beside the usual ones that the run measures.
    """
    more = [chart for family, charts in _OF_FAMILIES.items() if family in families for chart in charts]
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
        for title, tags in (*_CHARTS, *more)
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=CATEGORY, chart=charts)])
    described = metadata.create_summary_metadata()
    described.data_class = DATA_CLASS_TENSOR
    tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()])
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, metadata=described, tensor=tensor)])


def links(
    logdir: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, port: int = 6006
) -> list[str]:
    """The command that starts TensorBoard, and the links that then open the tab and the right cards.

    Args:
        logdir: What TensorBoard is started on.
        folder: Where the event file of the run lies, at or under ``logdir``; None opens the tab on whatever run.
        port: Where TensorBoard listens.

    Example:
        >>> command, tab, cards = links("runs/a b", "runs/a b/version_0")
        >>> command
        "tensorboard --logdir 'runs/a b'"
        >>> tab
        'http://localhost:6006/#traindiag&p.traindiag.run=version_0'
        >>> cards[:40], cards[-23:]
        ('http://localhost:6006/?pinnedCards=%5B%7', '&smoothing=0#timeseries')
    """
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    command = "tensorboard --logdir " + shlex.quote(os.fspath(logdir)) + (f" --port {port}" if port != 6006 else "")
    page = f"http://localhost:{port}/"
    name = None if folder is None else _run_name(logdir, folder)
    run = "" if name is None else f"&p.traindiag.run={quote(name, safe='')}"
    return [command, f"{page}#traindiag{run}", f"{page}?pinnedCards={quote(pinned, safe='')}&smoothing=0#timeseries"]


def _run_name(logdir: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str | None:
    """What TensorBoard calls the run of a folder; None where it does not lie under what TensorBoard is started on."""
    relative = Path(os.path.relpath(folder, logdir))
    return None if relative.parts[:1] == ("..",) else relative.as_posix()
