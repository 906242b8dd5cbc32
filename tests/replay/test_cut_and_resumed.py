"""The default pack over a log that is cut, resumed or goes on otherwise: what was said before stays as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.test_wiring_alerts import gpt
from tests.replay.test_live_and_replay_agree import as_text, train
from tests.rules.test_resume_anywhere import carried
from traindiag.playback.judged import judge
from traindiag.playback.series import Column, frames_of, replay_series
from traindiag.record.frame import Frame
from traindiag.record.recording import read_recordings
from traindiag.record.run_info import RunInfo
from traindiag.rules.default_pack import default_rules
from traindiag.rules.rule import Verdict
from traindiag.rules.rule_set import RuleSet


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> list[Frame]:
    """A run whose logits run away, and that ends in NaN."""
    folder: Path = tmp_path_factory.mktemp("run")
    model = gpt()

    def after(step: int) -> None:
        if step == 100:
            with torch.no_grad():
                model.get_parameter("blocks.0.mlp.0.weight")[0, 0] = math.nan

    train(folder, model=model, lr=0.5, steps=110, every_n_steps=3, after=after)
    (recording,) = read_recordings(folder)
    return list(recording.frames())


def made_by_hand() -> list[Frame]:
    """Every signal that the pack reads as one series, with growth, jumps, falls, NaN, infinity and holes."""
    rng = np.random.default_rng(0)
    names = sorted({name for rule in default_rules() for name in rule.signals if not name.startswith("wiring/")})
    columns = []
    for name in names:
        rate, start = rng.choice([-0.2, -0.05, 0.0, 0.05, 0.2]), float(np.exp(rng.normal(0, 2)))
        series: list[float | None] = list(start * np.exp(rate * np.arange(80) + rng.normal(0, 0.2, 80)))
        for bad in (math.nan, math.inf, -math.inf, None, 0.0, 1e6):
            series[int(rng.integers(80))] = bad
        columns.append(Column.of(name, series, every=2))
    return list(frames_of(columns, RunInfo(run_id="r", length=400)))


def frames(kind: str, logged: list[Frame]) -> list[Frame]:
    return logged if kind == "logged" else made_by_hand()


def said(rules: RuleSet, series: Sequence[Frame]) -> list[list[Verdict]]:
    return [rules.update(frame) for frame in series]


def fresh() -> RuleSet:
    return RuleSet(default_rules(), strict=True)


@pytest.mark.parametrize("kind", ["logged", "by hand"])
def test_resumed_at_any_frame_it_says_the_same(kind: str, logged: list[Frame]) -> None:
    series = frames(kind, logged)
    whole = fresh()
    unbroken = said(whole, series)
    assert len({v.rule for verdicts in unbroken for v in verdicts}) >= 4
    first = fresh()
    for cut in range(len(series)):
        if cut % 7 == 0:
            second = fresh()
            second.load_state_dict(carried(first.state_dict()))
            assert repr(said(second, series[cut:])) == repr(unbroken[cut:])
            assert repr(second.state_dict()) == repr(whole.state_dict())
        first.update(series[cut])


@pytest.mark.parametrize("kind", ["logged", "by hand"])
def test_what_comes_later_changes_nothing_that_was_said(kind: str, logged: list[Frame]) -> None:
    series = frames(kind, logged)
    whole = [as_text(judge(series[:cut], None, "r").alerts) for cut in range(0, len(series) + 1, 11)]
    every = judge(series, None, "r").alerts
    assert len(every) >= 4 and any(a.rule == "nonfinite" for a in every)
    for k, alerts in enumerate(whole):
        assert alerts == as_text(every)[: len(alerts)]
        if 11 * k < len(series):
            assert len(alerts) >= sum(a.step < series[11 * k].step for a in every)
    cut = len(series) // 2
    before = repr(said(fresh(), series)[:cut])
    for bad in (math.nan, math.inf, 0.0, 1e30):
        assert repr(said(fresh(), [*series[:cut], *(spoilt(f, bad) for f in series[cut:])])[:cut]) == before


def spoilt(frame: Frame, bad: float) -> Frame:
    readings = {
        name: replace(r, values=np.where(r.seen, np.float32(bad), r.values)) for name, r in frame.readings.items()
    }
    return replace(frame, readings=readings)


def test_rules_leave_the_frames_alone(logged: list[Frame]) -> None:
    for series in (logged, made_by_hand()):
        before = [[(r.values.tobytes(), r.seen.tobytes()) for r in f.readings.values()] for f in series]
        said(fresh(), series)
        assert [[(r.values.tobytes(), r.seen.tobytes()) for r in f.readings.values()] for f in series] == before


def test_every_signal_of_the_pack_can_be_a_bare_series() -> None:
    """Without cells of any axis, as somebody else's log has it: no rule is switched off by it."""
    series = {name: [1.0, 2.0, math.nan, 4.0, *[5.0] * 30] for rule in default_rules() for name in rule.signals}
    columns = [Column.of(name, values) for name, values in series.items()]
    assert judge(frames_of(columns, RunInfo()), None, "r").notes == []
    assert replay_series(series)
