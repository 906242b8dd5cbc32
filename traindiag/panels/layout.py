"""Where to look in a stock TensorBoard: the custom-scalars layout, the pinned cards and the command to open it."""

from __future__ import annotations

import json
import os
import shlex
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
PINNED = ("diag_attention/max_logit", "diag_gradient/norm", "diag_loss/value", "diag_alerts/severity")


def layout_summary() -> Summary:
    """Summary of our category. A run keeps the last layout written into it, so a user's own replaces this one."""
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags)) for title, tags in _CHARTS
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=CATEGORY, chart=charts)])
    described = metadata.create_summary_metadata()
    described.data_class = DATA_CLASS_TENSOR
    tensor = TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()])
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, metadata=described, tensor=tensor)])


def links(logdir: str | os.PathLike[str], port: int = 6006) -> list[str]:
    """The command that starts TensorBoard, and the link that then opens the right cards.

    Example:
        >>> command, link = links("runs/a b")
        >>> command
        "tensorboard --logdir 'runs/a b'"
        >>> link[:40], link[-23:]
        ('http://localhost:6006/?pinnedCards=%5B%7', '&smoothing=0#timeseries')
    """
    cards = json.dumps([{"plugin": "scalars", "tag": tag} for tag in PINNED], separators=(",", ":"))
    command = "tensorboard --logdir " + shlex.quote(os.fspath(logdir)) + (f" --port {port}" if port != 6006 else "")
    return [command, f"http://localhost:{port}/?pinnedCards={quote(cards, safe='')}&smoothing=0#timeseries"]
