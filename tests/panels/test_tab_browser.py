"""The tab in a real browser, in a real TensorBoard, on logs of real runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from playwright.sync_api import Browser, Frame, Page, Playwright, sync_playwright

from tests.panels.conftest import HOSTILE, grid, write_run
from traindiag.panels.figures import PANELS
from traindiag.record.log import read_log

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60_000  # ms: machines may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(
            f"no browser on PATH, looked for {', '.join(BROWSERS)}. Install one: apt-get install -y chromium "
            "(elsewhere: any Chromium or Chrome)"
        )
    with sync_playwright() as playwright:
        launched = start(playwright, path)
        yield launched
        launched.close()


def start(playwright: Playwright, path: str) -> Browser:
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def logdir(tab_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the logs, to which runs are added."""
    root = tmp_path_factory.mktemp("browser")
    shutil.copytree(tab_logs, root / "logs")
    write_run(
        root / "logs" / "large", "large", range(60), cells=grid(48, 32), every=1, signals=("attention/logit_range",)
    )
    return root / "logs"


@pytest.fixture(scope="module")
def address(logdir: Path) -> Iterator[str]:
    """Where TensorBoard answers, started by its own command with its entry points."""
    path = [str(ROOT)]
    if "traindiag" not in {e.name for e in metadata.entry_points(group="tensorboard_plugins")}:
        installed = logdir.parent / "entry" / "traindiag_tab-0.dist-info"  # these sources are not installed
        installed.mkdir(parents=True)
        where = re.search(
            r"\[project.entry-points.tensorboard_plugins\]\n(.*)", (ROOT / "pyproject.toml").read_text()
        )
        assert where is not None
        (installed / "entry_points.txt").write_text("[tensorboard_plugins]\n" + where[1].replace('"', ""))
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: traindiag-tab\nVersion: 0\n")
        path.append(str(installed.parent))
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logdir),
        "--port",
        "0",
        "--reload_interval",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"http://localhost:\d+/", line)
        if found:
            break
    assert found, "".join(lines)
    yield found[0]
    process.terminate()
    process.wait()
    process.stderr.close()


def plot(block: str) -> str:
    """The chart of a block, as the page's own script has it."""
    return f"document.querySelector(\"[data-block='{block}'] .plot\")"


class Tab:
    """The page, with everything that it says and asks for."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: self.asked.append(r.url))

    def open(
        self, panel: str = "overview", run: str | None = "unstable/version_0", *, query: str = "", **more: Any
    ) -> Frame:
        """Follows a link; loads the page only where that is needed."""
        chosen = {"run": run, "panel": panel, **more}
        link = "#traindiag" + "".join(
            f"&p.traindiag.{k}={quote(str(v), safe='')}" for k, v in chosen.items() if v is not None
        )
        here = self.page.url.partition("#")
        if here[0] == self.address + query and here[2] and "#" + here[2] != link:
            self.frame.evaluate("delete document.querySelector('.app').dataset.drawn")
            self.page.evaluate("link => { location.hash = link }", link)
        else:
            self.page.goto("about:blank")
            self.page.goto(self.address + query + link)
        self.drawn(panel)
        return self.frame

    @property
    def frame(self) -> Frame:
        self.page.wait_for_selector("iframe", state="attached", timeout=WAIT)
        for _ in range(100):
            found = next((f for f in self.page.frames if "name=traindiag" in f.url), None)
            if found is not None:
                return found
            self.page.wait_for_timeout(50)
        raise AssertionError(f"TensorBoard shows no such tab: {[f.url for f in self.page.frames]}")

    def drawn(self, panel: str, theme: str = "") -> None:
        self.frame.wait_for_selector(f".app[data-drawn^='{panel} {theme}']", timeout=WAIT)

    @property
    def hash(self) -> str:
        return unquote(self.page.evaluate("location.hash"))

    def check(self) -> None:
        """Nothing went wrong, and nothing came from elsewhere."""
        theirs = [url for url in self.asked if not url.startswith((self.address, "about:", "data:", "blob:"))]
        errors, self.asked, self.errors = self.errors, [], []
        assert not theirs, "something was fetched from another host"
        assert not errors


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(WAIT)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def one_tab(page: Page, address: str) -> Tab:
    return Tab(page, address)


@pytest.fixture
def tab(one_tab: Tab) -> Iterator[Tab]:
    yield one_tab
    one_tab.check()


SEEN = {
    "overview": ("timeline",),
    "attention": ("heads", "heads-over-time", "heads-over-steps"),
    "output": ("log-z",),
    "gradients": ("gradient-norm", "gradient-by-block"),
    "activations": (),
    "compare": ("compare-loss-value",),
}


def test_each_panel_draws_what_the_run_has(tab: Tab) -> None:
    frame = tab.open()
    for panel in PANELS:
        frame.click(f"#tab-{panel.id}")
        tab.drawn(panel.id)
        assert frame.get_attribute(f"#tab-{panel.id}", "aria-selected") == "true"
        figures = frame.locator(".block.figure").count()
        plots = frame.locator(".block.figure .js-plotly-plot .main-svg").count()
        assert plots >= figures
        for block in SEEN.get(panel.id, ()):
            plot = frame.locator(f"[data-block='{block}'] .plot")
            # a chart may come a moment after its panel; where nothing is drawn, waiting fails with the block's name
            plot.locator(".trace path, .hm image").first.wait_for(state="attached", timeout=WAIT)
        if panel.id in SEEN and panel.id != "overview":
            assert figures >= 2
        if panel.id in ("plasticity", "stability"):
            assert "Nothing was measured" in frame.inner_text(".board")
        overflow = frame.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"{panel.id} is wider than the page"


def test_dark_mode_is_followed_while_it_is_toggled(tab: Tab) -> None:
    frame = tab.open("attention", query="?darkMode=false")
    colour = "getComputedStyle(document.querySelector('.js-plotly-plot .xtick text')).fill"
    surface = "getComputedStyle(document.querySelector('.block.figure')).backgroundColor"
    light = frame.evaluate(colour), frame.evaluate(surface)
    tab.page.evaluate("document.body.classList.add('dark-mode')")
    tab.drawn("attention", "dark")
    dark = frame.evaluate(colour), frame.evaluate(surface)
    assert light[0] != dark[0] and light[1] != dark[1]
    tab.page.evaluate("document.body.classList.remove('dark-mode')")
    tab.drawn("attention", "light")
    assert (frame.evaluate(colour), frame.evaluate(surface)) == light
    frame = tab.open("overview", None, query="?darkMode=true&runFilter=healthy")  # where no run is named
    tab.drawn("overview", "dark")
    assert frame.is_checked("[aria-label='Show healthy/version_0']")
    assert frame.locator(".run-list input:checked").count() == 1


def test_a_deep_link_opens_run_panel_step_and_place(tab: Tab, logdir: Path) -> None:
    series = read_log(logdir / "healthy").history["attention/logit_range"]
    step, layer = int(series.steps[3]), str(series.cells.coordinates[-1][0])
    tab.page.goto("about:blank")
    frame = tab.open("attention", "healthy/version_0", step=step, layer=layer)
    assert frame.inner_text("[data-block='heads'] output") == str(step)
    assert frame.is_checked("[aria-label='Show healthy/version_0']")
    assert not frame.is_checked("[aria-label='Show unstable/version_0']")
    first = frame.evaluate(plot("heads-over-time") + ".data.map(t => t.name).find(n => /head/.test(n))")
    assert layer.split(".")[-2] in first
    # A link that is pasted while the tab is open is followed too.
    tab.page.evaluate("location.hash = '#traindiag&p.traindiag.run=resumed%20on&p.traindiag.panel=overview'")
    tab.drawn("overview")
    frame.wait_for_selector("[aria-label='Show resumed + resumed on']:checked")


def test_an_alert_leads_to_its_panel_layer_and_step(tab: Tab) -> None:
    frame = tab.open()
    row = frame.locator("[data-block='alerts'] tbody tr[data-severity]", has_text="Attention logits").first
    step = row.locator("td.step").first.inner_text()
    details = frame.locator("[data-block='alerts'] tr.details").first
    assert "what to do" in details.inner_text()
    row.locator("button.go").click()
    tab.drawn("attention")
    at = re.search(r"p\.traindiag\.step=(\d+)", tab.hash)
    assert at is not None and int(at[1]) >= int(step)
    assert re.search(r"p\.traindiag\.cell=.*blocks\.\d", tab.hash)
    title = frame.inner_text("[data-block='heads'] h3")
    assert title.endswith(f"at step {frame.inner_text('[data-block=heads] output')}")
    lines = frame.evaluate(plot("heads-over-time") + ".layout.shapes.filter(s => s.name === 'chosen')")
    assert [line["x0"] for line in lines] == [int(at[1])]
    # So does a mark above the loss.
    frame.click("#tab-overview")
    tab.drawn("overview")
    marks = frame.locator("[data-block='timeline'] .trace .points path.point")
    box = marks.last.bounding_box()
    assert box is not None
    tab.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.drawn("attention")


def test_reload_and_the_page_itself_bring_what_is_new(tab: Tab, logdir: Path) -> None:
    write_run(logdir / "live", "live", range(30))
    tab.open("attention", None)
    for _ in range(40):
        if tab.frame.locator("[aria-label='Show live']").count():
            break
        tab.page.click(".reload-button")
        tab.page.wait_for_timeout(300)
    tab.frame.click("button[title='Only live']")
    tab.frame.wait_for_function("document.querySelector('[data-block=heads] output')?.textContent === '20'")
    write_run(logdir / "live", "live", range(30, 50), segment=1)
    for _ in range(2):  # a look every five seconds explains one of two, and not both
        with tab.page.expect_request(lambda request: "traindiag/state" in request.url, timeout=4000):
            tab.page.click(".reload-button")
    tab.frame.wait_for_function("document.querySelector('[data-block=heads] output')?.textContent === '40'")
    assert "step 49" in tab.frame.inner_text("li.chosen")
    tab.page.reload()  # the address knows what was shown
    tab.drawn("attention")
    tab.frame.wait_for_selector("[aria-label='Show live']:checked")


def test_only_a_tab_in_front_asks(tab: Tab) -> None:
    frame = tab.open()
    look = "import('./static/host.js').then((host) => host.isVisible())"
    assert frame.evaluate(look) is True
    tab.page.evaluate("location.hash = '#timeseries'")
    tab.page.wait_for_function("getComputedStyle(document.querySelector('iframe')).visibility === 'hidden'")
    assert frame.evaluate(look) is False


def test_everything_can_be_reached_by_keys(tab: Tab) -> None:
    frame = tab.open("attention")
    frame.focus("#tab-attention")
    tab.page.keyboard.press("ArrowRight")
    tab.drawn("output")
    assert frame.evaluate("document.activeElement.id") == "tab-output"
    tab.page.keyboard.press("Home")
    tab.drawn("overview")
    fold = frame.locator("[data-block='alerts'] .fold").first
    before = fold.get_attribute("aria-expanded")
    fold.focus()
    tab.page.keyboard.press("Enter")
    assert fold.get_attribute("aria-expanded") != before
    frame.click("#tab-attention")
    tab.drawn("attention")
    frame.focus("[data-block='heads'] input[type=range]")
    shown = frame.inner_text("[data-block='heads'] output")
    tab.page.keyboard.press("ArrowLeft")
    frame.wait_for_function(
        f"document.querySelector('[data-block=heads] h3').textContent.endsWith('step ' + {PREVIOUS})"
    )
    assert frame.inner_text("[data-block='heads'] output") != shown
    unnamed = frame.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter((e) => !e.closest('.plot'))"
        ".filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.closest('label'))).length"
    )
    assert unnamed == 0


PREVIOUS = "document.querySelector('[data-block=heads] output').textContent.replace(',', '')"


def test_severities_are_filtered_in_table_and_timeline(tab: Tab) -> None:
    frame = tab.open(run=HOSTILE)
    rows = frame.locator("[data-block='alerts'] tr[data-severity]")
    names = plot("timeline") + ".data.map(t => t.name)"
    assert rows.count() == 1
    assert "critical" in frame.evaluate(names)
    frame.click("[data-block='alerts'] .chip.critical")
    frame.wait_for_function(f"!{names}.includes('critical')")
    assert rows.count() == 0
    assert "severity=warning,info" in tab.hash
    frame.click("[data-block='alerts'] .chip.critical")
    frame.wait_for_function(f"{names}.includes('critical')")
    assert rows.count() == 1


def test_runs_are_compared_in_one_chart_and_sorted_in_a_table(tab: Tab) -> None:
    frame = tab.open("compare", "healthy/version_0")
    frame.check("[aria-label='Show unstable/version_0']")
    frame.wait_for_function("document.querySelectorAll('[data-block=runs] tbody tr').length === 2")
    names = frame.evaluate(
        "document.querySelector(\"[data-block='compare-loss-value'] .plot\").data.map((t) => t.name)"
    )
    assert {"healthy/version_0", "unstable/version_0"} <= set(names)
    column = "[...document.querySelectorAll('[data-block=runs] tbody tr')].map((r) => r.cells[7].textContent)"
    header = frame.locator("[data-block='runs'] th").nth(7)
    found = []
    for direction in ("ascending", "descending"):
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == direction
        found.append([float(v) for v in frame.evaluate(column)])
    assert found[0] == sorted(found[0]) and found[1] == found[0][::-1] and found[0][0] < found[0][1]
    frame.click("#tab-attention")
    tab.drawn("attention")
    assert frame.locator("h2.run-name").all_inner_texts() == ["healthy/version_0", "unstable/version_0"]


def test_names_and_alerts_with_markup_are_text(tab: Tab) -> None:
    frame = tab.open(run=HOSTILE)
    for panel in ("attention", "compare", "overview"):
        frame.click(f"#tab-{panel}")
        tab.drawn(panel)
        assert frame.locator("img").count() == 0
    assert HOSTILE in frame.inner_text("[data-block='alerts']")
    assert HOSTILE in frame.inner_text(".run-list")
    assert "pwned" not in frame.title() + tab.page.title()


def test_what_is_no_number_is_shown_as_such(tab: Tab) -> None:
    frame = tab.open("attention", HOSTILE, step=90)
    assert {"NaN", "inf"} <= set(frame.locator("[data-block='heads'] .plot text").all_text_contents())


def test_a_slider_moves_fast_on_a_large_model(tab: Tab) -> None:
    frame = tab.open("attention", "large")
    times = frame.evaluate(
        """async () => {
            const input = document.querySelector("[data-block=heads] input[type=range]");
            const plot = document.querySelector("[data-block=heads] .plot");
            const times = [];
            for (let at = 5; at < 45; at += 5) {
                const began = performance.now();
                const drawn = new Promise((done) => plot.once('plotly_afterplot', done));
                input.value = at;
                input.dispatchEvent(new Event('input', { bubbles: true }));
                await drawn;
                times.push(performance.now() - began);
            }
            return times;
        }"""
    )
    assert min(times) < 200, times  # of several, so that a busy machine does not matter


@pytest.mark.parametrize("reason", ["no plotly", "no server"])
def test_what_is_missing_is_said(browser: Browser, address: str, reason: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    tab = Tab(page, address)
    said = 'Charts need plotly: pip install "traindiag[tab]"'
    if reason == "no plotly":

        def without(route: Any) -> None:
            state = route.fetch().json()
            route.fulfill(body=json.dumps({**state, "charts": said}), content_type="application/json")

        page.route("**/traindiag/state*", without)
        page.route("**/traindiag/plotly.js", lambda route: route.fulfill(status=404, body="{}"))
        frame = tab.open()
        assert said in frame.inner_text(".problem")
        assert "This chart needs plotly." in frame.inner_text("[data-block='timeline']")
        assert frame.locator("[data-block='alerts'] tr[data-severity]").count() >= 1
    else:
        frame = tab.open()
        page.route("**/traindiag/panel*", lambda route: route.abort())
        frame.click("#tab-output")
        frame.wait_for_selector("[role=alert]")
        assert "TensorBoard does not answer" in frame.inner_text("[role=alert]")
    page.close()


def test_without_a_browser_the_test_fails_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    find: Callable[[], Iterator[Browser]] = browser.__wrapped__  # type: ignore[attr-defined]
    with pytest.raises(pytest.fail.Exception, match="apt-get install -y chromium"):
        next(find())
