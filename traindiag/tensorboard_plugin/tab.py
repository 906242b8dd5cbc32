"""What the tab's page asks for, answered: its files, which runs there are, and the panels of some of them."""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers
from werkzeug.exceptions import HTTPException

from traindiag.panels.figures import PANELS, Block, PanelContent, build
from traindiag.panels.figures.attention import heads
from traindiag.panels.figures.overview import timeline
from traindiag.panels.figures.view import View
from traindiag.record.log import LogData
from traindiag.tensorboard_plugin.assets import INSTALL, TYPES, packed, plotly_script, static_files
from traindiag.tensorboard_plugin.runs import Found, Run, Runs

KEPT_ANSWERS = 64
A_DAY = 86_400
MOST_RUNS = 50
"""Runs in one panel."""

PARTS: Mapping[str, Callable[[View], Sequence[Block]]] = {
    "heads": lambda view: [block for block in [heads(view)] if block is not None],
    "timeline": timeline,
}
"""Blocks that are asked for by themselves, by a slider at each of its steps or by a filter, without their panels."""

_logger = logging.getLogger("tensorboard")
Answer = Callable[["Tab", wrappers.Request], wrappers.Response]


class Refusal(Exception):
    """What was asked for cannot be given; ``code`` is an HTTP status."""

    def __init__(self, text: str, code: int = 404) -> None:
        super().__init__(text)
        self.code = code


class Tab(base_plugin.TBPlugin):  # type: ignore[misc]
    """The plugin. Whatever goes wrong is told to the page in words and never raised into TensorBoard."""

    plugin_name = "traindiag"

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._runs = Runs(context.data_provider, context.logdir)
        self._answers: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    def is_active(self) -> bool:
        """Whether to be shown though TensorBoard has seen no data of ours: no."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="Training diagnostics")

    def get_plugin_apps(self) -> Mapping[str, Any]:
        return {
            "/static/*": self._serve(_static),
            "/plotly.js": self._serve(_plotly),
            "/state": self._serve(_state),
            "/panel": self._serve(_panel),
        }

    def find(self, request: wrappers.Request, wanted: Sequence[str] = ()) -> Found:
        """Every run that whoever asks may see; the logs of those that are wanted are read."""
        environment = request.environ
        return self._runs.find(plugin_util.context(environment), plugin_util.experiment_id(environment), wanted)

    def remember(self, key: tuple[Any, ...], make: Callable[[], str]) -> str:
        """What was answered to the same question about the same data."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        answer = make()
        with self._lock:
            self._answers[key] = answer
            while len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _serve(self, answer: Answer) -> Any:
        @wrappers.Request.application
        def serve(request: wrappers.Request) -> wrappers.Response:
            try:
                if request.method not in ("GET", "HEAD"):
                    raise Refusal(f"{request.method} is not taken here", 405)
                return answer(self, request)
            except Refusal as refusal:
                return _json(request, {"error": str(refusal)}, refusal.code)
            except HTTPException:
                raise
            except Exception as error:
                _logger.warning("traindiag: %s failed", request.path, exc_info=True)
                text = f"This could not be shown: {type(error).__name__}: {error}"
                return _json(request, {"error": text}, 500)

        return serve


def _static(tab: Tab, request: wrappers.Request) -> wrappers.Response:
    name = request.path.partition("/static/")[2]
    content = static_files().get(name)
    if content is None:
        raise Refusal("there is no such file")
    return _respond(request, content, TYPES[name[name.rindex(".") :]])


def _plotly(tab: Tab, request: wrappers.Request) -> wrappers.Response:
    script = plotly_script()
    if script is None:
        raise Refusal(INSTALL)
    return _respond(request, packed(script), "text/javascript", content_encoding="gzip", expires=A_DAY)


def _state(tab: Tab, request: wrappers.Request) -> wrappers.Response:
    found = tab.find(request)
    data = {
        "panels": [{"id": panel.id, "title": panel.title} for panel in PANELS],
        "runs": [_summary(run) for run in found.runs.values()],
        "problems": list(found.problems),
        "charts": None if plotly_script() is not None else INSTALL,
    }
    return _json(request, data)


def _summary(run: Run) -> dict[str, Any]:
    known = {
        "name": run.name,
        "folders": list(run.folders),
        "stamp": run.stamp,
        "step": run.last_step,
        "sampled": run.sampled,
        "read": run.log is not None,
    }
    if run.log is None:
        return {**known, "length": None, "severity": None, "jobs": len(run.folders), "problems": []}
    worst = {a.get("id"): a.get("severity") for a in run.log.alerts if a.get("status") != "closed"}
    return {
        **known,
        "length": run.log.run.length if isinstance(run.log.run.length, int) else None,
        "severity": next((s for s in ("critical", "warning", "info") if s in worst.values()), None),
        "jobs": len(run.log.segments),
        "problems": list(run.log.problems),
    }


def _panel(tab: Tab, request: wrappers.Request) -> wrappers.Response:
    asked = request.args.to_dict(flat=False)
    panel, theme = asked.pop("panel", ["overview"])[-1], asked.pop("theme", ["light"])[-1]
    names, block = asked.pop("run", []), asked.pop("block", [None])[-1]
    if panel not in (ids := [p.id for p in PANELS]):
        raise Refusal(f"there is no panel {panel!r}, only {', '.join(ids)}")
    if theme not in ("light", "dark"):
        raise Refusal(f"the theme is light or dark, got {theme!r}", 400)
    if block is not None and block not in PARTS:
        raise Refusal(f"there is no block {block!r} by itself, only {', '.join(PARTS)}")
    found = tab.find(request, names[:MOST_RUNS])
    runs: dict[str, LogData] = {}
    stamps = []
    for name in names[:MOST_RUNS]:
        run = found.run(name)
        if run is None or run.log is None:
            raise Refusal(f"there is no run {name!r} any more")
        runs[run.name] = run.log
        stamps.append((run.name, run.stamp))
    if not runs:
        raise Refusal("no run was named", 400)
    options = {name: values[-1] for name, values in sorted(asked.items())}

    def make() -> str:
        if block is None:
            return build(panel, runs, theme=theme, options=options).to_json()
        views = [View(name, log, theme, options) for name, log in runs.items()]
        return PanelContent(panel, "", tuple(_part(block, views))).to_json()

    key = panel, theme, block, tuple(options.items()), tuple(stamps)
    return _respond(request, tab.remember(key, make), "application/json")


def _part(block: str, views: Sequence[View]) -> Iterator[Block]:
    """One block of each run, under the ids that it has in the whole panel."""
    for at, view in enumerate(views):
        for found in PARTS[block](view):
            yield found if len(views) == 1 else {**found, "id": f"{at}-{found['id']}", "run": view.name}


def _respond(request: wrappers.Request, content: str | bytes, kind: str, **more: Any) -> wrappers.Response:
    response: wrappers.Response = http_util.Respond(request, content, kind, **more)
    return response


def _json(request: wrappers.Request, data: Mapping[str, Any], code: int = 200) -> wrappers.Response:
    return _respond(request, json.dumps(data, allow_nan=False), "application/json", code=code)
