"""Alerts over HTTP: they arrive, what is down costs training nothing, and the address is in no text."""

from __future__ import annotations

import io
import json
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_on_ranks
from traindiag import Alert, Diagnostics, Raise, Threshold, TrainingAlert, Webhook
from traindiag.panels.terminal import TerminalPanel

SECRET = "B0-this-is-secret"
ALERT = Alert(
    "1f", "opened", "kl", "run", 0, 120, 0.0, None, "warning", "slow", "reward", "reward/kl", "a<b", float("nan"),
    10.0, "threshold", title="KL is high",
)  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers with the codes it is given, one after the other, and with 200 when there are none left."""

    daemon_threads = True

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.got: list[tuple[str, str, dict[str, Any], float]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}"

    def handle_error(self, *_: Any) -> None:  # a client that has given up is no error here
        pass


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.got.append((self.path, self.headers["Content-Type"], body, time.monotonic()))
        time.sleep(server.delay)
        self.send_response(server.codes.pop(0) if server.codes else 200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def unreachable() -> str:
    with Server() as closed:
        return closed.url


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_slack_reads_it_and_programs_do(server: Server) -> None:
    hook = Webhook(server.url)
    hook(ALERT)
    assert hook.finish() == []
    ((path, kind, body, _),) = server.got
    assert (path, kind) == (f"/services/{SECRET}", "application/json")
    assert body["text"] == "WARNING step 120: KL is high (reward/kl nan, limit 10)\na&lt;b"
    assert Alert.from_dict(body["alert"]).to_dict() == ALERT.to_dict()


def test_only_what_it_is_for_is_sent(server: Server) -> None:
    hook = Webhook(server.url, severity="critical")
    hook(ALERT)
    hook(replace(ALERT, severity="critical", status="escalated"))
    hook(replace(ALERT, severity="critical", status="closed"))
    hook.finish()
    assert [body["alert"]["status"] for *_, body, _ in server.got] == ["escalated"]


def test_tries_again_with_growing_patience(server: Server) -> None:
    server.codes = [500, 503, 429]
    hook = Webhook(server.url, backoff=0.1)
    hook(ALERT)
    wait_for(lambda: len(server.got) == 4)
    assert hook.finish() == []
    times = [at for *_, at in server.got]
    waits = [b - a for a, b in pairwise(times)]
    assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4)))


def test_waits_as_long_as_the_service_asks_for(server: Server) -> None:
    server.codes, server.headers = [429], {"Retry-After": "1"}
    hook = Webhook(server.url, backoff=0.01)
    hook(ALERT)
    wait_for(lambda: len(server.got) == 2)
    assert server.got[1][-1] - server.got[0][-1] >= 1.0
    hook.finish()


def test_what_can_never_work_is_not_tried_again(server: Server) -> None:
    server.codes = [404]
    hook = Webhook(server.url, backoff=0.01)
    hook(ALERT)
    wait_for(lambda: bool(server.got))
    cause = "it answers with HTTP 404 (1 attempt)"
    assert hook.finish() == [f"the webhook does not get alerts: {cause}; training goes on"]
    assert len(server.got) == 1


def test_follows_no_redirect(server: Server) -> None:
    other = Server()
    server.codes, server.headers = [302], {"Location": other.url}
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hook = Webhook(server.url, backoff=0.01)
    hook(ALERT)
    (problem,) = hook.finish()
    other.shutdown()
    other.server_close()
    assert "HTTP 302" in problem and not other.got


def test_a_slow_server_blocks_neither_training_nor_its_end(server: Server) -> None:
    server.delay = 30.0
    hook = Webhook(server.url)
    begin = time.monotonic()
    for _ in range(300):
        hook(ALERT)
    assert time.monotonic() - begin < 1.0
    assert "more than 100 alerts wait for the webhook" in hook.problems()[0]
    begin = time.monotonic()
    (problem,) = hook.finish(patience=0.3)
    assert time.monotonic() - begin < 2.0
    assert "were not sent to the webhook: it took longer than 0.3 s" in problem


def run(
    folder: Path, *actions: Any, steps: int = 12, terminal: bool = True
) -> tuple[Diagnostics, list[float], BaseException | None]:
    """A loop of one's own in which a number passes its limit every step; the time that each step took."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rules = [Threshold(f"user/number{i}", above=0.5, name=f"rule {i}") for i in range(steps)]
    diagnostics = Diagnostics(
        model, optimizer, folder, rules=rules, actions=actions, terminal=terminal, default_rules=False
    )
    times: list[float] = []
    try:
        for i in range(steps):
            begin = time.perf_counter()
            with diagnostics.step() as step:
                step.loss(model(torch.ones(2, 4)).square().mean()).backward()
                diagnostics.log(f"user/number{i}", 1.0)
                optimizer.step()
                optimizer.zero_grad()
            times.append(time.perf_counter() - begin)
        diagnostics.finish()
    except TrainingAlert as error:
        return diagnostics, times, error
    return diagnostics, times, None


def test_training_with_a_slow_server(server: Server, tmp_path: Path) -> None:
    server.delay = 1.0
    diagnostics, times, _ = run(tmp_path, Webhook(server.url), steps=6)
    assert len(diagnostics.alerts) == 6
    assert sorted(times)[-2] < 0.9  # a step that waited would take a second
    assert server.got


def test_training_with_a_server_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = Webhook(unreachable(), backoff=0.01, attempts=3)
    diagnostics, _, _ = run(tmp_path, hook)
    shown = capsys.readouterr().err
    assert shown.count("the webhook does not get alerts: ConnectionRefusedError: Connection refused") == 1
    assert shown.count("webhook") == 1
    assert len(diagnostics.alerts) == 12  # and it was still called, and training went on


def test_alerts_of_a_run_that_ends_by_one_arrive(server: Server, tmp_path: Path) -> None:
    _, _, error = run(tmp_path, Webhook(server.url), Raise())
    assert isinstance(error, TrainingAlert)
    assert error.alert.id in {body["alert"]["id"] for *_, body, _ in server.got}


@pytest.mark.parametrize("how", ["url", "env"])
def test_the_secret_is_in_no_text(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = unreachable()
    monkeypatch.setenv("HOOK", address)
    hook = Webhook(address, attempts=1) if how == "url" else Webhook(env="HOOK", attempts=1)
    diagnostics, _, _ = run(tmp_path, hook)
    texts = [repr(hook), str(hook), repr(diagnostics.settings), str(diagnostics.run), repr(diagnostics.alerts)]
    texts.append(str(diagnostics.state_dict()))
    output = capsys.readouterr()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and "webhook" in output.err
    assert not any(SECRET in text for text in [*texts, output.err, output.out])
    assert not any(SECRET.encode() in content for content in written)


@pytest.mark.parametrize(
    "address",
    [SECRET, f"ftp://example.org/{SECRET}", f"https:///{SECRET}", f"https://example.org/{SECRET} x", f"//{SECRET}",
     f"https://example.org:{SECRET}/", f"https://exämple.org/{SECRET}", f"https://[{SECRET}/", f"https://x/{SECRET}\n"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["url", "env"])
def test_an_address_that_is_none_is_refused_and_not_shown(
    address: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", address)
    with pytest.raises(ValueError, match="must be an address that begins with https://") as error:
        Webhook(address) if how == "url" else Webhook(env="HOOK")
    assert SECRET not in str(error.value) and error.value.__cause__ is None


def test_what_is_wrong_is_told_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="either url= or env="):
        Webhook()
    with pytest.raises(ValueError, match="'NO_SUCH_VARIABLE' is not set"):
        Webhook(env="NO_SUCH_VARIABLE")
    for name, value in (("timeout", 0), ("backoff", -1.0), ("attempts", 0), ("queue", 1.5)):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
            Webhook("https://example.org", **{name: value})


def test_a_copy_for_another_process_sends_too(server: Server) -> None:
    hook = Webhook(server.url)
    hook(ALERT)
    copy = pickle.loads(pickle.dumps(hook))
    copy(ALERT)
    assert hook.finish() == copy.finish() == [] and len(server.got) == 2


def test_summary_tells_what_was_silenced() -> None:
    stream = io.StringIO()
    TerminalPanel(stream).summary({}, [], 10, None, {"gradient/norm-spike": "batches of\n very unequal length"})
    assert "silenced: gradient/norm-spike (batches of very unequal length)" in stream.getvalue()


def _on_rank(rank: int, url: str) -> list[str]:
    hook = Webhook(url, diagnosis="number")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rules = [Threshold("user/number", above=0.5, name="number")]
    diagnostics = Diagnostics(model, optimizer, rules=rules, actions=[hook], terminal=False)
    for _ in range(3):
        with diagnostics.step() as step:
            step.loss(model(torch.ones(2, 4)).square().mean()).backward()
            diagnostics.log("user/number", 1.0)
            optimizer.step()
    diagnostics.finish()
    return [alert.id for alert in diagnostics.alerts if alert.rule == "number"]


def test_one_rank_posts(server: Server) -> None:
    one, other = run_on_ranks(_on_rank, server.url)
    assert one == other != []
    assert [body["alert"]["id"] for *_, body, _ in server.got] == one
