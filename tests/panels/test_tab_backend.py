"""What the tab's page is given, through TensorBoard's own application and both of its readers."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.application import TensorBoardWSGIApp
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
from tensorboard.context import RequestContext
from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
from tensorboard.plugins.core.core_plugin import CorePluginLoader
from tensorboard.util import grpc_util
from werkzeug.test import Client

from tests.panels.conftest import HOSTILE, grid, write_run
from traindiag.panels.figures import PANELS
from traindiag.record.log import read_log
from traindiag.tensorboard_plugin import assets, runs
from traindiag.tensorboard_plugin.plugin import SAMPLES, Loader

ROOT = Path(__file__).parents[2]
READERS = ("fast", "python")


class Server:
    """TensorBoard's application over one folder, without a port."""

    def __init__(self, logdir: Path, reader: str, *, known_logdir: bool = True) -> None:
        flags = Namespace(
            logdir=str(logdir), logdir_spec="", samples_per_plugin={}, path_prefix="", window_title="",
            generic_data="auto", purge_orphaned_data=True, max_reload_threads=1, reload_multifile=False,
            reload_multifile_inactive_secs=0, detect_file_replacement=None, reload_interval=0, reload_task="blocking",
        )  # fmt: skip
        Loader().fix_flags(flags)
        if reader == "fast":
            self.ingester: Any = SubprocessServerDataIngester(
                get_server_binary(),
                str(logdir),
                reload_interval=1,
                channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
                samples_per_plugin=flags.samples_per_plugin,
            )
        else:
            self.ingester = LocalDataIngester(flags)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it forgets its process, which ends with its input
            self.ingester.start()
        self.provider = self.ingester.data_provider
        if not known_logdir:
            flags.logdir = "gs://somewhere/else"
        self.application = TensorBoardWSGIApp(flags, [CorePluginLoader(), Loader()], self.provider)
        self.client = Client(self.application)
        self.await_runs()

    def await_runs(self) -> None:
        """The fast reader lists what it has read so far."""
        before, until = None, time.monotonic() + 20
        while time.monotonic() < until:
            listed = self.provider.list_tensors(RequestContext(), experiment_id="", plugin_name="traindiag")
            now = {run: {tag: s.max_step for tag, s in tags.items()} for run, tags in listed.items()}
            if now and now == before:
                return
            before = now
            time.sleep(0.2 if isinstance(self.ingester, SubprocessServerDataIngester) else 0)

    def close(self) -> None:
        if isinstance(self.ingester, SubprocessServerDataIngester):
            self.ingester._stdin_handle.close()  # the fast reader ends with its input

    def get(self, path: str, code: int = 200, **query: Any) -> Any:
        response = self.client.get(f"/data/plugin/traindiag/{path}", query_string=query)
        assert response.status_code == code, response.get_data()[:500]
        return response

    def json(self, path: str, code: int = 200, **query: Any) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.get(path, code, **query).get_data(), parse_constant=refuse)


@pytest.fixture(scope="module", params=READERS)
def server(request: pytest.FixtureRequest, tab_logs: Path) -> Iterator[Server]:
    opened = Server(tab_logs, request.param)
    yield opened
    opened.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    opened: list[Server] = []

    def start(logdir: Path, reader: str, **more: Any) -> Server:
        opened.append(Server(logdir, reader, **more))
        return opened[-1]

    yield start
    for server in opened:
        server.close()


def blocks(content: Any, kind: str) -> list[Any]:
    return [b for b in content["blocks"] if b["kind"] == kind]


def test_tensorboard_lists_the_tab_as_active(server: Server) -> None:
    listing = json.loads(server.client.get("/data/plugins_listing").get_data())
    assert listing["traindiag"]["tab_name"] == "Training diagnostics"
    assert listing["traindiag"]["enabled"]
    entry = server.client.get("/data/plugin_entry.html?name=traindiag")
    assert b"./static/index.js" in entry.get_data()


def test_runs_bear_tensorboards_names_and_jobs_of_one_run_are_one(server: Server) -> None:
    found = {run["name"]: run for run in server.json("state")["runs"]}
    assert {"healthy/version_0", "unstable/version_0", HOSTILE, "resumed + resumed on"} == set(found)
    again = found["resumed + resumed on"]
    assert (again["folders"], again["jobs"], again["step"]) == (["resumed", "resumed on"], 2, 159)
    assert found["unstable/version_0"]["severity"] in ("warning", "critical")
    assert found["healthy/version_0"]["severity"] in (None, "info")
    for name in again["folders"]:
        whole, part = (server.get("panel", run=n, panel="overview").get_data() for n in (again["name"], name))
        assert whole == part


@pytest.mark.parametrize("panel", [p.id for p in PANELS])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_panel_is_strict_json_for_one_run_and_for_several(server: Server, panel: str, theme: str) -> None:
    names = [run["name"] for run in server.json("state")["runs"]]
    for run in ([names[0]], names):
        content = server.json("panel", run=run, panel=panel, theme=theme)
        assert content["panel"] == panel
        assert content["blocks"]


def test_what_is_drawn_is_what_was_recorded(server: Server, tab_logs: Path) -> None:
    series = read_log(tab_logs / "healthy").history["attention/logit_range"]
    step = int(series.steps[3])
    (figure,) = server.json("panel", run="healthy/version_0", panel="attention", block="heads", step=step)["blocks"]
    text = figure["figure"]["data"][0]["text"]
    assert figure["id"] == "heads"
    assert [c["value"] for c in figure["controls"]] == ["attention/logit_range", step]
    drawn = np.array(text, dtype=float)
    np.testing.assert_allclose(drawn, series.grid("layer", "head")[3], rtol=1e-2)


def test_a_block_by_itself_is_the_block_of_its_panel(server: Server) -> None:
    runs_ = ["healthy/version_0", "resumed"]
    whole = {b.get("id"): b for b in server.json("panel", run=runs_, panel="attention", step=20)["blocks"]}
    for block in server.json("panel", run=runs_, panel="attention", step=20, block="heads")["blocks"]:
        assert block == whole[block["id"]]
    filtered = server.json("panel", run=HOSTILE, panel="overview", block="timeline", severity="warning")
    assert not any(t.get("name") == "critical" for t in filtered["blocks"][0]["figure"]["data"])


def test_steps_that_were_gone_through_again_are_told_apart(server: Server) -> None:
    (timeline,) = server.json("panel", run="resumed", panel="overview", block="timeline")["blocks"]
    traces = {t["name"]: t for t in timeline["figure"]["data"]}
    assert traces["gone through again"]["x"][0] == 60
    assert traces["gone through again"]["x"][-1] == 99
    loss = traces["training loss"]
    at = loss["x"].index(80)
    assert loss["y"][at] == pytest.approx(0.5 * (3 - 0.08), rel=1e-4)


def test_names_with_markup_stay_text(server: Server) -> None:
    content = server.json("panel", run=HOSTILE, panel="attention")
    assert "<img" not in json.dumps([b["figure"] for b in blocks(content, "figure")])
    (table, _) = blocks(server.json("panel", run=HOSTILE, panel="overview"), "table")
    assert table["rows"][0]["title"] == HOSTILE  # the page puts it in as text
    for path in ("state", "panel"):
        response = server.get(path, run=HOSTILE)
        assert response.headers["Content-Type"].startswith("application/json")
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_nan_and_infinity_are_marked_and_absence_is_neither(server: Server) -> None:
    (figure,) = server.json("panel", run=HOSTILE, panel="attention", block="heads", step=90)["blocks"]
    _, marks = figure["figure"]["data"]
    assert {t for line in marks["text"] for t in line} == {"NaN", "inf", ""}
    (figure,) = server.json("panel", run=HOSTILE, panel="attention", block="heads", step=50)["blocks"]
    values = np.array(figure["figure"]["data"][0]["z"], dtype=float)
    assert np.isnan(values).sum() == 1
    assert len(figure["figure"]["data"]) == 1


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ({"panel": "overview"}, 400, "no run was named"),
        ({"panel": "overview", "run": "gone"}, 404, "no run 'gone'"),
        ({"panel": "secrets", "run": "resumed"}, 404, "no panel 'secrets'"),
        ({"panel": "overview", "run": "resumed", "theme": "pink"}, 400, "light or dark"),
        ({"panel": "overview", "run": "resumed", "block": "x"}, 404, "no block 'x'"),
    ],
)
def test_what_cannot_be_given_is_refused_in_words(
    server: Server, query: dict[str, str], code: int, words: str
) -> None:
    assert words in server.json("panel", code, **query)["error"]


@pytest.mark.parametrize("step", ["x", "nan", "inf", "-5", "1e400", ""])
def test_options_may_be_anything(server: Server, step: str) -> None:
    options = {"step": step, "cell": HOSTILE, "signal": "../../etc/passwd", "severity": "'"}
    for panel in ("overview", "attention"):
        server.json("panel", run="resumed", panel=panel, **options)


@pytest.mark.parametrize(
    "name",
    ["../tab.py", "..%2ftab.py", "%2e%2e/plugin.py", "/etc/passwd", "....//tab.py", "index.js/../../tab.py",
     "", "no.js", "..\\tab.py", "index.js%00.css"],
)  # fmt: skip
def test_the_static_route_gives_its_own_files_and_nothing_else(server: Server, name: str) -> None:
    response = server.client.get("/data/plugin/traindiag/static/" + name)
    assert response.status_code == 404
    assert b"import" not in response.get_data()


def test_files_come_with_their_types_and_plotly_compressed(server: Server) -> None:
    assert server.get("static/index.js").headers["Content-Type"].startswith("text/javascript")
    assert server.get("static/style.css").headers["Content-Type"].startswith("text/css")
    response = server.client.get("/data/plugin/traindiag/plotly.js", headers={"Accept-Encoding": "gzip"})
    assert len(response.get_data()) < 2_500_000
    assert b"plotly.js v" in gzip.decompress(response.get_data())[:200]
    assert "max-age" in response.headers["Cache-Control"]
    assert server.client.post("/data/plugin/traindiag/state").status_code == 405


def test_without_plotly_the_tab_says_what_to_install(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "traindiag[tab]"' in server.json("state")["charts"]
    assert 'pip install "traindiag[tab]"' in server.json("plotly.js", 404)["error"]
    assert server.json("panel", run="resumed", panel="overview")["blocks"]  # tables and cards need no plotly


def test_only_the_page_and_the_frame_around_it_are_spoken_to() -> None:
    for name, content in assets.static_files().items():
        text = content.decode()
        assert "://" not in text, name
        assert "innerHTML" not in text, name
        assert "insertAdjacentHTML" not in text, name


@pytest.mark.parametrize("reader", READERS)
def test_where_files_are_out_of_reach_tensorboards_sample_is_shown_and_said(
    serve: Callable[..., Server], reader: str, tab_logs: Path
) -> None:
    near, far = serve(tab_logs, reader), serve(tab_logs, reader, known_logdir=False)
    runs_ = {r["name"]: r for r in far.json("state")["runs"]}
    assert all(r["sampled"] for r in runs_.values())
    assert set(runs_) == {r["name"] for r in near.json("state")["runs"]}
    for panel in ("overview", "attention", "output"):
        query = {"run": "unstable/version_0", "panel": panel}
        assert far.json("panel", **query) == near.json("panel", **query)


@pytest.mark.parametrize("reader", READERS)
def test_a_run_that_goes_on_is_seen_to_go_on(serve: Callable[..., Server], reader: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", range(20))
    server = serve(tmp_path, reader)
    (before,) = server.json("state")["runs"]
    assert (before["name"], before["step"]) == ("a", 19)
    assert server.json("state")["runs"] == [before]
    write_run(tmp_path / "a", "a", range(20, 50), segment=1)
    (after,) = server.json("state")["runs"]
    assert (after["step"], after["jobs"]) == (49, 2)
    assert after["stamp"] != before["stamp"]


@pytest.mark.parametrize("reader", READERS)
def test_of_many_runs_the_latest_are_read_and_others_when_they_are_chosen(
    serve: Callable[..., Server], reader: str, tab_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = runs.read_file
    monkeypatch.setattr(runs, "read_file", lambda file: read.append(file.parent.name) or original(file))
    monkeypatch.setattr(runs, "EAGER_BYTES", 0)
    server = serve(tab_logs, reader)
    found = {r["name"]: r for r in server.json("state")["runs"]}
    assert not read and not any(r["read"] for r in found.values())
    assert set(found) == {"healthy/version_0", "unstable/version_0", HOSTILE, "resumed + resumed on"}
    assert found["resumed + resumed on"]["step"] == 159
    server.json("panel", run="resumed", panel="overview")
    assert read == ["resumed", "resumed on"]
    found = {r["name"]: r for r in server.json("state")["runs"]}
    assert [name for name, r in found.items() if r["read"]] == ["resumed + resumed on"]
    server.json("panel", run=HOSTILE, panel="overview")
    server.json("panel", run="resumed", panel="output")
    assert read == ["resumed", "resumed on", HOSTILE]
    monkeypatch.setattr(runs, "KEPT_BYTES", 0)
    server.json("panel", run=HOSTILE, panel="overview")
    assert [r["name"] for r in server.json("state")["runs"] if r["read"]] == []
    size = sum(f.stat().st_size for f in (tab_logs / HOSTILE).iterdir())
    monkeypatch.setattr(runs, "EAGER_BYTES", 10 * size)
    assert server.json("state")["runs"][0]["read"]


@pytest.mark.parametrize("reader", READERS)
def test_a_run_that_has_just_begun_and_an_empty_folder(
    serve: Callable[..., Server], reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "await_runs", lambda self: time.sleep(0.5))
    empty = serve(tmp_path, reader)
    assert empty.json("state")["runs"] == []
    assert not json.loads(empty.client.get("/data/plugins_listing").get_data())["traindiag"]["enabled"]
    write_run(tmp_path, "a", [0], signals=())
    monkeypatch.undo()
    server = serve(tmp_path, reader)
    (run,) = server.json("state")["runs"]
    assert run["name"] == "."
    for panel in PANELS:
        assert server.json("panel", run=".", panel=panel.id)["blocks"]


def damage(kind: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    if kind == "cut off":
        file.write_bytes(data[: len(data) * 2 // 3])
    elif kind == "overwritten":
        data[len(data) // 2 : len(data) // 2 + 3000] = os.urandom(3000)
        file.write_bytes(data)
    elif kind == "descriptions":
        file.write_bytes(data.replace(b'"axes":["layer"', b'"axes":[7,layer"'))
    elif kind == "alerts":
        file.write_bytes(data.replace(b'"status":"opened"', b'"status":[null]xxx'))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["cut off", "overwritten", "descriptions", "alerts"])
def test_damaged_data_is_shown_as_far_as_it_goes_and_said(
    serve: Callable[..., Server], reader: str, kind: str, tmp_path: Path, tab_logs: Path
) -> None:
    shutil.copytree(tab_logs / HOSTILE, tmp_path / "bad")
    write_run(tmp_path / "good", "good", range(30))
    (file,) = (tmp_path / "bad").iterdir()
    damage(kind, file)
    server = serve(tmp_path, reader)
    found = {run["name"]: run for run in server.json("state")["runs"]}
    assert found["bad"]["problems"]
    assert not found["good"]["problems"]
    for panel in PANELS:
        assert server.json("panel", run=["bad", "good"], panel=panel.id)["blocks"]


def test_jobs_that_cannot_be_joined_cost_their_run_only(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", "a", range(5))
    write_run(tmp_path / "b", "b", range(5))
    join = runs.join

    def fails(segments: Any) -> Any:
        if segments[0].run == "a":
            raise KeyError("step")
        return join(segments)

    monkeypatch.setattr(runs, "join", fails)
    state = serve(tmp_path, "python").json("state")
    assert [r["name"] for r in state["runs"]] == ["b"]
    assert "a: its parts do not fit together" in state["problems"][0]


def test_a_fault_of_ours_is_told_in_the_tab_and_not_raised(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr("traindiag.tensorboard_plugin.tab.build", fails)
    answer = server.json("panel", 500, run="resumed", panel="output", step="77")
    assert answer["error"] == "This could not be shown: RuntimeError: a fault"


def test_two_runs_in_one_folder_have_a_name_each(serve: Callable[..., Server], tmp_path: Path) -> None:
    write_run(tmp_path / "x", "one", range(5))
    write_run(tmp_path / "x", "two", range(5))
    assert [r["name"] for r in serve(tmp_path, "python").json("state")["runs"]] == ["x (one)", "x (two)"]


def test_a_large_damaged_file_that_grows_is_not_read_all_the_time(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    read = runs.read_file
    calls = []

    def slow(file: Path) -> Any:
        calls.append(file)
        now[0] += 2.0
        return read(file)

    monkeypatch.setattr(runs, "read_file", slow)
    write_run(tmp_path / "a", "a", range(5))
    provider = serve(tmp_path, "python").provider
    calls.clear()
    found = runs.Runs(provider, str(tmp_path), clock=lambda: now[0])
    found.find(RequestContext(), "")
    (file,) = (tmp_path / "a").iterdir()
    for _ in range(4):
        with file.open("ab") as out:
            out.write(b"\0")
        found.find(RequestContext(), "")
    assert len(calls) == 1
    now[0] += 2.0 * runs.PATIENCE
    found.find(RequestContext(), "")
    assert len(calls) == 2


def test_a_large_model_opens_and_slides_fast(serve: Callable[..., Server], tmp_path: Path) -> None:
    # 1,000 samples x 48 layers x 32 heads. What the server spends, so that a busy machine does not matter.
    write_run(tmp_path, "big", range(1000), cells=grid(48, 32), every=1, signals=("attention/logit_range",))
    server = serve(tmp_path, "python")
    began = time.process_time()
    server.json("state")
    server.json("panel", run=".", panel="attention")
    opening = time.process_time() - began
    assert opening < 2.0
    began = time.process_time()
    for step in range(100, 900, 100):
        server.json("panel", run=".", panel="attention", block="heads", step=step)
    assert (time.process_time() - began) / 8 < 0.1


def test_the_entry_point_is_the_loader_and_asks_for_enough_samples() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (where,) = re.findall(r'\[project.entry-points.tensorboard_plugins\]\ntraindiag = "(.*)"', project)
    module, _, name = where.partition(":")
    assert getattr(import_module(module), name) is Loader
    flags = Namespace(samples_per_plugin={})
    Loader().fix_flags(flags)
    assert flags.samples_per_plugin == {"traindiag": SAMPLES}
    theirs = Namespace(samples_per_plugin={"traindiag": 50})
    Loader().fix_flags(theirs)
    assert theirs.samples_per_plugin == {"traindiag": 50}


def python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_starting_tensorboard_imports_the_base_plugin_and_nothing_of_ours() -> None:
    code = """
import sys
import traindiag.tensorboard_plugin.plugin
ours = {m for m in sys.modules if m.startswith("traindiag")}
print(sorted(ours), sorted({"numpy", "torch", "lightning", "plotly"} & set(sys.modules)))
"""
    expected = ["traindiag", "traindiag.tensorboard_plugin", "traindiag.tensorboard_plugin.plugin"]
    assert python(code).strip() == f"{expected} []"


def test_serving_every_panel_imports_no_torch(tab_logs: Path) -> None:
    code = """
import sys
from pathlib import Path
from types import SimpleNamespace
from werkzeug.test import Client
from tensorboard.plugins.base_plugin import TBContext
from traindiag.panels.figures import PANELS
from traindiag.tensorboard_plugin.plugin import Loader

class Provider:
    def list_tensors(self, *args, **more):
        return {"healthy/version_0": {}}

tab = Loader().load(TBContext(data_provider=Provider(), logdir=sys.argv[1]))
apps = tab.get_plugin_apps()
for panel in PANELS:
    response = Client(apps["/panel"]).get("/", query_string={"run": "healthy/version_0", "panel": panel.id})
    assert response.status_code == 200, response.get_data()
Client(apps["/plotly.js"]).get("/")
print(sorted({"torch", "lightning", "pytorch_lightning", "transformers", "plotly", "tensorflow"} & set(sys.modules)))
"""
    assert python(code, str(tab_logs)).strip() == "[]"


@pytest.mark.parametrize("broken", ["numpy", "traindiag.panels.figures", "traindiag.tensorboard_plugin.assets"])
def test_whatever_is_broken_tensorboard_starts_without_the_tab(broken: str) -> None:
    code = f"""
import sys
sys.modules[{broken!r}] = None
from tensorboard.plugins.base_plugin import TBContext
from traindiag.tensorboard_plugin.plugin import Loader
print(Loader().load(TBContext(data_provider=None, logdir="/nowhere")))
"""
    assert python(code).strip() == "None"
