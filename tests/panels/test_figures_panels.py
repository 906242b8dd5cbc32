"""Panels: the numbers in figures are the log's, what is no number is shown as such, and no name becomes markup."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.panels.logs import HOSTILE, alert, heads, history, log
from traindiag.alerts.alert import Remedy
from traindiag.alerts.limits import Limit, default_limits
from traindiag.panels.figures import PANELS, build
from traindiag.panels.figures.attention import heads as heads_at
from traindiag.panels.figures.content import Block
from traindiag.panels.figures.view import View
from traindiag.panels.notebook import as_plotly, plot
from traindiag.record.cells import Cells
from traindiag.record.coverage import Coverage
from traindiag.record.log import LogData
from traindiag.record.run_info import RunInfo

ADAM = Cells.along("optimizer", ["AdamW"])


def grown(steps: int = 30, layers: int = 3, count: int = 4) -> tuple[LogData, np.ndarray]:
    rng = np.random.default_rng(0)
    values = np.exp(np.linspace(0, 8, steps))[:, None] * np.exp(rng.normal(0, 0.3, layers * count))
    values = values.astype(np.float32)
    made = history({"attention/logit_range": (range(0, steps * 10, 10), heads(layers, count), values)})
    return log(made), values.reshape(steps, layers, count)


def block(logs: LogData | dict[str, LogData], panel: str, key: str, **options: str) -> Block:
    named = logs if isinstance(logs, dict) else {"run": logs}
    found = [b for b in build(panel, named, options=options).blocks if b.get("id") == key]
    assert found, f"{panel} has no {key}: {[b.get('id') for b in build(panel, named, options=options).blocks]}"
    return found[0]


def trace(made: Block, name: str) -> dict[str, Any]:
    return next(t for t in made["figure"]["data"] if t.get("name") == name)


# -- numbers ------------------------------------------------------------------------------------------------


def test_a_slice_is_the_sample_of_its_step() -> None:
    logs, values = grown()
    made = block(logs, "attention", "heads", step="120")
    drawn = made["figure"]["data"][0]
    np.testing.assert_allclose(10 ** np.array(drawn["z"]), values[12], rtol=1e-5)
    assert drawn["y"] == [f"model.blocks.{i}.attention" for i in range(3)]
    assert made["controls"][1]["value"] == 120 and made["controls"][1]["values"] == list(range(0, 300, 10))


@pytest.mark.parametrize(("wanted", "shown"), [("124", 120), ("126", 130), ("-5", 0), ("9999", 290), ("x", 290)])
def test_a_slice_is_that_of_the_nearest_sample(wanted: str, shown: int) -> None:
    logs, _ = grown()
    assert block(logs, "attention", "heads", step=wanted)["controls"][1]["value"] == shown


def test_colours_mean_the_same_at_every_step() -> None:
    logs, _ = grown()
    ends = {
        (t["zmin"], t["zmax"])
        for step in ("0", "120", "290")
        for t in block(logs, "attention", "heads", step=step)["figure"]["data"]
    }
    assert len(ends) == 1


def test_rows_over_steps_are_the_heads() -> None:
    logs, values = grown()
    drawn = block(logs, "attention", "heads-over-steps")["figure"]["data"][0]
    assert drawn["x"] == list(range(0, 300, 10))
    np.testing.assert_allclose(10 ** np.array(drawn["z"]), values.reshape(30, 12).T, rtol=1e-5)
    assert drawn["y"][0] == "blocks.0 head 0" and drawn["y"][-1] == "blocks.2 head 3"


def test_the_worst_heads_are_drawn_with_their_limits() -> None:
    logs, values = grown()
    made = block(logs, "attention", "heads-over-time")
    flat = values.reshape(30, 12)
    for cell in np.argsort(-flat[-1])[:5]:
        layer, head = divmod(int(cell), 4)
        line = trace(made, f"blocks.{layer} head {head}")
        assert line["x"] == list(range(0, 300, 10))
        np.testing.assert_allclose(line["y"], flat[:, cell], rtol=1e-5)
    np.testing.assert_allclose(trace(made, "median")["y"], np.median(flat, axis=1), rtol=1e-5)
    lines = {s["y0"] for s in made["figure"]["layout"]["shapes"] if s["y0"] == s["y1"]}
    assert lines == {limit.value for limit in default_limits()["attention/logit_range"]}
    labels = {a["text"] for a in made["figure"]["layout"]["annotations"]}
    assert {"limit 1e3", "limit 1e4"} <= labels


def test_a_cell_that_was_chosen_is_drawn_although_it_is_not_the_worst() -> None:
    logs, values = grown()
    least = int(values.reshape(30, 12)[-1].argmin())
    label = f"model.blocks.{least // 4}.attention head {least % 4}"
    made = block(logs, "attention", "heads-over-time", cell=label)
    trace(made, f"blocks.{least // 4} head {least % 4}")


def test_limits_may_come_from_elsewhere() -> None:
    logs, _ = grown()
    own = {"attention/logit_range": [Limit(77.0, "above", "critical", "mine", "mine")]}
    found = build("attention", {"run": logs}, limits=own).figures()["heads-over-time"]
    assert [s["y0"] for s in found["layout"]["shapes"] if s["y0"] == s["y1"]] == [77.0]


def test_default_limits_are_those_of_the_pack() -> None:
    limits = default_limits()
    assert [(x.value, x.side) for x in limits["optimizer/grad_rms_over_eps"]] == [(1.0, "below"), (0.1, "below")]
    assert [x.value for x in limits["optimizer/sentinel_rms_t"]] == [5.0]


def test_a_limit_far_away_is_named_and_does_not_flatten_the_values() -> None:
    steps = range(20)
    made = history({"activation/growth_exponent": (steps, Cells.along("layer", ["blocks"]), np.full((20, 1), 0.01))})
    drawn = block(log(made), "activations", "growth-exponent")["figure"]["layout"]
    assert not [s for s in drawn["shapes"] if s["y0"] == 1.0]
    assert [a["text"] for a in drawn["annotations"]] == ["limit 1 lies above this chart"]


def test_gradient_norms_before_and_after_clipping() -> None:
    rng = np.random.default_rng(1)
    before, after = np.exp(rng.normal(size=(50, 1))), np.minimum(np.exp(rng.normal(size=(5, 1))), 1.0)
    made = history(
        {"gradient/norm": (range(50), ADAM, before), "gradient/norm_applied": (range(0, 50, 10), ADAM, after)}
    )
    drawn = block(log(made, run=RunInfo(clip=("norm", 1.0))), "gradients", "gradient-norm")
    np.testing.assert_allclose(trace(drawn, "before clipping")["y"], before[:, 0], rtol=1e-5)
    np.testing.assert_allclose(trace(drawn, "as the optimizer used it")["y"], after[:, 0], rtol=1e-5)
    assert "clipped by norm at 1" in drawn["note"]


def test_the_bound_belongs_to_the_head_of_its_colour() -> None:
    value = np.exp(np.arange(24).reshape(4, 6) / 4)
    made = history(
        {
            "attention/max_logit": (range(4), heads(3, 2), value),
            "attention/max_logit_bound": (range(4), heads(3, 2), value * 2),
        }
    )
    drawn = block(log(made), "attention", "value-and-bound")
    solid, dotted = trace(drawn, "blocks.2 head 1"), trace(drawn, "bound of blocks.2 head 1")
    np.testing.assert_allclose(dotted["y"], 2 * np.array(solid["y"]), rtol=1e-5)
    assert solid["line"]["color"] == dotted["line"]["color"] and dotted["line"]["dash"] == "dot"


def test_a_profile_over_depth_is_one_sample() -> None:
    cells = Cells.along("layer", [f"blocks.{i}" for i in range(6)])
    values = np.exp(np.random.default_rng(2).normal(size=(11, 6)))
    drawn = block(log(history({"activation/rms": (range(11), cells, values)})), "activations", "rms-over-depth")
    np.testing.assert_allclose(trace(drawn, "step 10")["y"], values[10], rtol=1e-5)
    np.testing.assert_allclose(trace(drawn, "step 0")["y"], values[0], rtol=1e-5)


def test_more_heads_than_rows_are_gathered_by_layer() -> None:
    values = np.random.default_rng(4).random((5, 12 * 16)).astype(np.float32) + 0.5
    made = history({"attention/logit_range": (range(5), heads(12, 16), values)})
    drawn = block(log(made), "attention", "heads-over-steps")["figure"]["data"][0]
    assert drawn["y"] == [f"blocks.{i}" for i in range(12)]
    np.testing.assert_allclose(np.array(drawn["z"]), values.reshape(5, 12, 16).max(axis=2).T, rtol=1e-5)


# -- what is no number --------------------------------------------------------------------------------------


def test_nan_and_infinity_are_marked_where_they_stood() -> None:
    values = np.linspace(3, 1, 40)[:, None]
    values[10:13] = np.nan
    values[30] = np.inf
    made = block(log(history({"loss/value": (range(40), ADAM, values)})), "overview", "timeline")
    marks = [t for t in made["figure"]["data"] if t["name"] == "no number"]
    assert [(m["x"], m["text"][0]) for m in marks] == [([10, 12], "NaN"), ([30], "inf")]
    line = trace(made, "training loss")
    assert [line["y"][line["x"].index(s)] for s in (10, 12, 30)] == [None] * 3
    assert "NaN at step 10 for 3 samples" in marks[0]["hovertext"]


def test_a_run_that_is_nan_to_the_end_is_not_empty() -> None:
    made = block(log(history({"loss/value": (range(5), ADAM, np.full((5, 1), np.nan))})), "overview", "timeline")
    assert [t["x"] for t in made["figure"]["data"] if t["name"] == "no number"] == [[0, 4]]


def test_what_a_logarithm_cannot_show_is_marked() -> None:
    values = np.array([[1.0], [100.0], [0.0], [10.0]])
    made = block(log(history({"gradient/norm": (range(4), ADAM, values)})), "gradients", "gradient-norm")
    assert made["figure"]["layout"]["yaxis"]["type"] == "log"
    mark = next(t for t in made["figure"]["data"] if t["name"] == "not on a logarithmic axis")
    assert mark["x"] == [2] and mark["text"] == ["0"]


def test_cells_without_a_number_are_told_from_cells_that_were_not_seen() -> None:
    values = np.ma.MaskedArray(np.ones((3, 4), np.float32), mask=False)
    values[2, 1], values[2, 2] = np.nan, np.inf
    values[2, 3] = np.ma.masked
    made = history({"attention/logit_range": (range(3), heads(2, 2), values)})
    values_drawn, marks = block(log(made), "attention", "heads", step="2")["figure"]["data"]
    assert values_drawn["z"] == [[1.0, None], [None, None]]
    assert marks["text"] == [["", "NaN"], ["inf", ""]] and marks["z"] == [[None, 1.0], [1.0, None]]


@pytest.mark.parametrize("panel", [p.id for p in PANELS])
def test_a_run_without_data_says_so(panel: str) -> None:
    content = build(panel, {"run": log()})
    assert any(b["kind"] == "note" for b in content.blocks)
    assert not content.figures()
    json.loads(content.to_json())
    assert build(panel, {}).blocks[0]["kind"] == "note"


def test_a_run_of_one_sample_is_drawn() -> None:
    made = history(
        {"attention/logit_range": ([0], heads(1, 1), np.ones((1, 1))), "loss/value": ([0], ADAM, np.ones((1, 1)))}
    )
    for panel in ("overview", "attention"):
        for option in ("", "inline"):
            found = build(panel, {"run": log(made)}, options={"slider": option}).figures()
            assert found and all(f["data"] for f in found.values())


# -- alerts, forecasts, jobs --------------------------------------------------------------------------------


def test_a_forecast_is_a_band_from_where_it_was_told_to_its_limit() -> None:
    logs, _ = grown()
    told = alert(100, kind="forecast", value=20.0, limit=1000.0, steps_to_limit=(50.0, 80.0, 130.0))
    made = block(log(logs.history, [told]), "attention", "heads-over-time")
    band = trace(made, "forecast at step 100")
    assert band["x"] == [100, 150, 230, 100] and band["y"] == [20.0, 1000.0, 1000.0, 20.0]
    assert band["text"] == "told at step 100: passes 1e3 in 80 (50-130) steps"


def test_alerts_stand_at_the_step_of_each_severity() -> None:
    logs, _ = grown()
    told = [alert(50), alert(120, status="escalated", severity="critical"), alert(260, status="closed")]
    made = block(log(logs.history, told), "attention", "heads-over-time")
    assert trace(made, "warning")["x"] == [50] and trace(made, "critical")["x"] == [120]
    row = block(log(logs.history, told), "overview", "alerts")["rows"][0]
    assert (row["severity"], row["step"], row["closed"]) == ("critical", 50, 260)
    assert row["remedies"][0] == {
        "text": "Lower the rate.", "when": "restart", "source": "a paper", "change": {"optimizer.lr": 0.03}
    }  # fmt: skip
    assert row["link"]["panel"] == "attention" and row["link"]["options"]["step"] == "120"
    assert row["link"]["options"]["cell"] == "model.blocks.0.attention head 1"


def test_alerts_are_filtered_by_severity() -> None:
    told = [alert(1, id="a"), alert(2, id="b", severity="info"), alert(3, id="c", severity="critical")]
    logs = log(history({"loss/value": (range(5), ADAM, np.ones((5, 1)))}), told)
    assert [r["id"] for r in block(logs, "overview", "alerts")["rows"]] == ["a", "b", "c"]
    assert [r["id"] for r in block(logs, "overview", "alerts", severity="critical,warning")["rows"]] == ["a", "c"]
    assert len(block(logs, "overview", "alerts", severity="nonsense")["rows"]) == 3


def test_unseen_families_are_grey_and_never_green() -> None:
    coverage = [Coverage("output", "unseen", ("head",), "a fused loss")]
    logs = log(history({"loss/value": ([0], ADAM, np.ones((1, 1)))}), [alert()], coverage)
    cards = {c["title"]: c for c in block(logs, "overview", "health")["cards"]}
    assert cards["attention"]["state"] == "warning" and cards["loss"]["state"] == "quiet"
    assert (cards["output"]["state"], cards["output"]["note"]) == ("unseen", "a fused loss")
    assert cards["gradient"]["state"] == "unseen"


def test_an_alert_that_cannot_be_read_is_told_and_hides_no_other() -> None:
    logs = log(alerts=[alert()])
    broken = log(alerts=())
    broken = LogData(**{**vars(broken), "alerts": ({"id": "x"}, *logs.alerts, {**logs.alerts[0], "severity": "odd"})})
    content = build("overview", {"run": broken})
    notes = [b["text"] for b in content.blocks if b["kind"] == "note"]
    assert sum("could not be read" in n for n in notes) == 2
    assert len(next(b for b in content.blocks if b.get("id") == "alerts")["rows"]) == 1


def test_jobs_are_joined_and_what_was_gone_through_again_is_grey() -> None:
    losses = np.linspace(4, 1, 30)[:, None]
    made = history({"loss/value": (range(30), ADAM, losses)}, {"loss/value": [0] * 20 + [1] * 10})
    again = history({"loss/value": (range(20, 25), ADAM, losses[20:25] + 1)})
    drawn = block(log(made, repeated=(again,)), "overview", "timeline")
    assert trace(drawn, "training loss")["x"] == list(range(30))
    grey = trace(drawn, "gone through again")
    assert grey["x"] == list(range(20, 25))
    np.testing.assert_allclose(grey["y"], losses[20:25, 0] + 1, rtol=1e-5)
    assert [s["x0"] for s in drawn["figure"]["layout"]["shapes"]] == [20]


# -- several runs -------------------------------------------------------------------------------------------


def test_runs_are_compared_by_their_worst_cell() -> None:
    a, values = grown()
    b, _ = grown(20)
    made = block({"first": a, "second": b}, "compare", "compare-attention-logit_range")
    np.testing.assert_allclose(trace(made, "first")["y"], values.reshape(30, 12).max(axis=1), rtol=1e-5)
    assert len(trace(made, "second")["x"]) == 20
    assert trace(made, "first")["line"]["color"] != trace(made, "second")["line"]["color"]


def test_beyond_four_runs_the_table_has_all_and_a_note_says_so() -> None:
    logs = {f"run {i}": grown()[0] for i in range(6)}
    content = build("compare", logs)
    assert [r["run"] for r in content.blocks[0]["rows"]] == list(logs)
    assert "first 4 of 6" in content.blocks[1]["text"]
    assert len(content.figures()["compare-attention-logit_range"]["data"]) == 4


def test_blocks_of_several_runs_say_whose_they_are() -> None:
    a, _ = grown()
    content = build("attention", {"x": a, "y": a})
    assert {b["run"] for b in content.blocks} == {"x", "y"}
    ids = [b["id"] for b in content.blocks]
    assert len(set(ids)) == len(ids)


# -- safety and weight --------------------------------------------------------------------------------------


def hostile() -> LogData:
    cells = Cells(("layer", "head"), ((HOSTILE, 0), (HOSTILE + "2", 0), ("c", 1)))
    made = history(
        {
            "attention/logit_range": (range(3), cells, np.exp(np.arange(9.0)).reshape(3, 3)),
            "attention/max_logit": (range(3), cells, np.arange(9.0).reshape(3, 3)),
            "attention/query_norm": (range(3), cells, np.arange(9.0).reshape(3, 3) + 1),
            "activation/rms": (range(3), Cells.along("layer", [HOSTILE, "b"]), np.ones((3, 2))),
            "gradient/norm": (range(3), Cells.along("optimizer", [HOSTILE, "b"]), np.ones((3, 2))),
            "gradient/block_norm": (
                range(3),
                Cells(("optimizer", "block"), ((HOSTILE, "b"), ("a", HOSTILE))),
                np.ones((3, 2)),
            ),
            "loss/value": (range(3), Cells.along("optimizer", [HOSTILE, "b"]), np.full((3, 2), np.nan)),
            "stability/value": (range(3), Cells.along("task", [HOSTILE]), np.ones((3, 1))),
            "stability/shift": ([1], Cells.along("reason", [HOSTILE]), np.ones((1, 1))),
            f"reward/{HOSTILE}": (range(3), Cells.single(), np.ones((3, 1))),
        }
    )
    told = alert(1, title=HOSTILE, where=HOSTILE, evidence=HOSTILE, cause=HOSTILE, remedies=(Remedy(HOSTILE),))
    return log(made, [told], [Coverage("output", "unseen", (HOSTILE,), HOSTILE)], RunInfo(model=HOSTILE))


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for v in value.values() for s in strings(v)]
    return [s for v in value for s in strings(v)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("panel", [p.id for p in PANELS])
def test_plotly_gets_no_markup_out_of_names(panel: str) -> None:
    logs = {HOSTILE: hostile(), "other": hostile()} if panel == "compare" else {HOSTILE: hostile()}
    content = build(panel, logs, options={"slider": "inline"})
    found = 0
    for drawn in content.figures().values():
        for text in strings(drawn):
            plain = text.replace("<br>", "").replace("<extra></extra>", "")
            assert "<" not in plain, text
            found += html.escape(HOSTILE, quote=False).replace("$", "&#36;") in text
    if content.figures():
        assert found or panel == "output"
    json.loads(content.to_json())


def test_nothing_heavy_is_needed() -> None:
    code = (
        "import sys\nfrom traindiag.panels.figures import PANELS, build\n"
        "from tests.panels.logs import log\n"
        "[build(p.id, {'a': log()}) for p in PANELS]\n"
        "heavy = {'torch', 'plotly', 'lightning', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_large_run_stays_light() -> None:
    """1,000 samples of 48 layers by 32 heads; a slider asks for one block."""
    values = np.exp(np.random.default_rng(0).normal(size=(1000, 48 * 32)).astype(np.float32))
    cells = heads(48, 32)
    made = history({})
    from traindiag.record.catalogue import BY_NAME

    for name in ("attention/logit_range", "attention/max_logit", "attention/entropy"):
        made.extend(BY_NAME[name], np.arange(1000) * 10, cells, values, np.ones(values.shape, np.bool_))
    began = time.process_time()
    whole = build("attention", {"run": log(made)}).to_json()
    middle = time.process_time()
    one = heads_at(View("run", log(made), options={"step": "5000"}))
    assert middle - began < 2.0 and time.process_time() - middle < 0.2
    assert len(whole) < 1_500_000
    assert one is not None and len(json.dumps(one, allow_nan=False)) < 150_000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_is_one_for_plotly(theme: str) -> None:
    for panel in PANELS:
        logs = {"a": hostile(), "b": grown()[0]} if panel.id == "compare" else {"a": hostile()}
        for made in build(panel.id, logs, theme=theme, options={"slider": "inline"}).blocks:
            if made["kind"] == "figure":
                assert as_plotly(made, theme).data


def test_plot_finds_figures_and_signals() -> None:
    logs, values = grown()
    assert plot(logs, "heads-over-time").layout.title.text == "The worst heads against the limits"
    drawn = plot(logs, "attention/logit_range")
    assert max(max(t.y) for t in drawn.data if t.mode == "lines+markers") == pytest.approx(values.max(), rel=1e-5)
    with pytest.raises(ValueError, match="Did you mean 'heads-over-time'"):
        plot(logs, "head-over-time")
    with pytest.raises(ValueError, match="no figure or signal 'attention/entropy'"):
        plot(logs, "attention/entropy")


def test_a_slip_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        build("atention", {"a": log()})
    with pytest.raises(ValueError, match="'light' or 'dark', got 'blue'"):
        build("overview", {"a": log()}, theme="blue")


@pytest.mark.parametrize(("first", "mode"), [(0, "tozero"), (10, "tozero"), (31214, "normal")])
def test_a_log_that_begins_late_is_not_a_stroke_at_the_edge(first: int, mode: str) -> None:
    logs = log(history({"loss/value": (range(first, first + 40), ADAM, np.ones((40, 1)))}))
    assert block(logs, "overview", "timeline")["figure"]["layout"]["xaxis"]["rangemode"] == mode
