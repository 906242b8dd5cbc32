"""Logs made by hand: what a panel is shown, with every number known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from traindiag.alerts.alert import Alert, Remedy
from traindiag.record.catalogue import BY_NAME
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.frame import Frame, Reading
from traindiag.record.log import LogData
from traindiag.record.log_format import LogEncoder
from traindiag.record.run_info import RunInfo
from traindiag.record.series import History
from traindiag.record.signal import Signal

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>[a](javascript:alert(2))|%{x}$x$`'


def history(
    values: Mapping[str, tuple[Sequence[int], Cells, Any]], segments: Mapping[str, Sequence[int]] | None = None
) -> History:
    """Signals by name as ``(steps, cells, values [n, cells])``; a masked value was not seen."""
    made = History()
    for name, (steps, cells, table) in values.items():
        worst = "min" if name in ("stability/value", "plasticity/fau", "plasticity/fau_pooled") else "max"
        signal = BY_NAME.get(name) or Signal(name, cells.axes, name, worst=worst)
        seen = ~np.ma.getmaskarray(table)
        data = np.ma.getdata(table).astype(np.float32).reshape(len(steps), len(cells))
        for k, step in enumerate(steps):
            segment = (segments or {}).get(name, [0] * len(steps))[k]
            made.extend(
                signal, np.array([step]), cells, data[k : k + 1], seen.reshape(data.shape)[k : k + 1], segment
            )
    return made


def heads(layers: int, count: int, prefix: str = "model.blocks.{}.attention") -> Cells:
    return Cells(("layer", "head"), tuple((prefix.format(i), h) for i in range(layers) for h in range(count)))


def log(
    made: History | None = None,
    alerts: Sequence[Alert] = (),
    coverage: Sequence[Coverage] = (),
    run: RunInfo | None = None,
    **more: Any,
) -> LogData:
    given: dict[str, Any] = {
        "run": run or RunInfo(run_id="r"),
        "history": made or History(),
        "alerts": tuple(a.to_dict() for a in alerts),
        "coverage": tuple(coverage),
        "segments": (0,),
        "files": (),
        "problems": (),
    }
    return LogData(**{**given, **more})


def alert(step: int = 20, **changes: Any) -> Alert:
    made = Alert(
        id="1f",
        status="opened",
        rule="attention/logit-range",
        run="r",
        segment=0,
        step=step,
        time=0.0,
        rank=None,
        severity="warning",
        clock="slow",
        family="attention",
        signal="attention/logit_range",
        where="model.blocks.0.attention head 1",
        value=1500.0,
        limit=1000.0,
        kind="threshold",
        title="Attention logits are too large",
        evidence="attention/logit_range is 1500, above 1e3; norms grew",
        cause="Queries and keys grow.",
        ruled_out=("a shift",),
        remedies=(Remedy("Lower the rate.", {"optimizer.lr": 0.03}, "restart", "a paper"),),
    )
    return dataclasses.replace(made, **changes)


def write_log(
    folder: Path,
    steps: range,
    *,
    segment: int = 0,
    run: RunInfo | None = None,
    alerts: Sequence[Alert] = (),
    loss: Callable[[int], float] = lambda step: 4.0 * 0.99**step + 1.0,
    host: str = "",
) -> Path:
    """Writes an event file as a run would: a loss at every step, logits at every tenth, alerts at theirs."""
    info = run or RunInfo(run_id="r1", length=len(steps))
    encoder = LogEncoder(info.run_id, segment)
    writer = EventFileWriter(str(folder), max_queue_size=10_000, filename_suffix=host)

    def put(step: int, summary: Any) -> None:
        writer.add_event(Event(summary=summary, step=step, wall_time=1e9 + step))

    put(steps[0], encoder.run(info, steps[0]))
    optimizer = Cells.along("optimizer", ["AdamW"])
    for step in steps:
        value = np.float32([loss(step)])
        frames = [Frame(step, "fast", {"loss/value": _seen("loss/value", optimizer, value)}, info, segment=segment)]
        if step % 10 == 0:
            table = np.exp(np.arange(4, dtype=np.float32) + step / 50)
            readings = {"attention/logit_range": _seen("attention/logit_range", heads(2, 2), table)}
            frames.append(Frame(step, "slow", readings, info, segment=segment))
        for at, summary in (part for frame in frames for part in encoder.frame(frame)):
            put(at, summary)
        told = [a.to_dict() for a in alerts if a.step == step]
        if told:
            put(step, encoder.alerts(told))
    for at, summary in encoder.flush():
        put(at, summary)
    writer.close()
    return next(folder.glob("events*"))


def _seen(name: str, cells: Cells, values: np.ndarray) -> Reading:
    return Reading(BY_NAME[name], cells, values, np.ones(len(values), np.bool_))
