"""MLflow's own pages in a real browser: whoever sweeps finds the curves where docs/runs.md says.

The pages are MLflow's and change with its versions; what is asserted is what is drawn, and the way there is by the words and
icons that a user sees, as far as they have names. Seen to work with MLflow 3.17.
"""

import contextlib
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rotssl.tracking.writer import Tracker, open_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(180)]

EXPERIMENT, SWEEP = "rotssl", "weight_budget_sample"
PLAIN, ROTATION = "byol-rotation0-10ep-seed0-1a2b3c4d", "byol-rotation1-10ep-seed0-5e6f7a8b"
EVALUATION = "linear-probe"
# MLflow takes a run's colour from its id, of 29: one pair in 29 looks the same. The tag mlflow.runColor chooses it, for the
# list of runs and its charts, though not for the page behind *Compare*.
COLORS = {PLAIN: "#7f7f7f", ROTATION: "#d62728"}

# What a browser that has been here before remembers: without it, a panel for an assistant covers a quarter of every page.
SEEN_BEFORE = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""

# The lines of the chart with this title, as plotly has drawn them: its data are bound to the SVG's elements. MLflow draws each
# run twice, one for smoothing; the later one lies on top.
DRAWN = """metric => {
  const lines = {};
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    let card = plot;
    while (card && !card.querySelector("h4")) card = card.parentElement;
    if (card?.querySelector("h4").textContent !== metric) continue;
    for (const group of plot.querySelectorAll(".scatterlayer .trace")) {
      const path = group.querySelector("path.js-line");
      if (!path) continue;
      const { trace } = group.__data__[0], box = path.getBoundingClientRect(), style = getComputedStyle(path);
      lines[trace.name] = { x: Array.from(trace.x), y: Array.from(trace.y), color: style.stroke,
                            width: box.width, height: box.height };
    }
  }
  return lines;
}"""

# Only the rows in view are in the page, so the table of metrics is scrolled until the name is there.
SCROLLED_TO = """metric => {
  if ([...document.querySelectorAll("a")].some(a => a.textContent === metric)) return true;
  for (const grid of document.querySelectorAll(".ReactVirtualized__Grid")) grid.scrollTop += 100;
}"""


def curves():
    """Rotation's weight -> epoch -> metrics of BYOL at its rate, seed 0: the record that the README's table is made of."""
    with sorted((ROOT / "benchmarks" / "results").glob("methods_sample_*.csv"))[-1].open() as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["seed"], row["lr"]) == ("byol", "0", "0.12")]
    points = {}
    for row in rows:
        if row["update_bn"] == "True":
            values = {key: float(value) for key, value in row.items() if "/" in key and value}
            points.setdefault(float(row["weight"]), {})[int(row["epoch"])] = values | {"cost/epochs": int(row["epoch"])}
    return points


def log_run(uri, folder, name, points, tags, params=None):
    """A finished run, through the functions that jobs use; returns its id."""
    run_id = open_run(uri, EXPERIMENT, name, None, params or {}, tags, folder / "artifacts")
    tracker = Tracker(uri, run_id)
    assert tracker.sync(points) and tracker.finish("FINISHED", "completed", [])
    return run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Address of a store with a sweep of two trials, one of them evaluated."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    parent = log_run(uri, folder, SWEEP, {}, {"kind": "sweep"})
    for name, weight in ((PLAIN, 0.0), (ROTATION, 1.0)):
        params = {"method.name": "byol", "rotation.weight": weight, "train.epochs": 10, "train.seed": 0}
        tags = {"mlflow.parentRunId": parent, "kind": "trial", "mlflow.runColor": COLORS[name]}
        trial = log_run(uri, folder, name, curves()[weight], tags, params)
    probe = {10: {"linear/top1": 0.814, "cost/epochs": 10}}
    log_run(uri, folder, EVALUATION, probe, {"mlflow.parentRunId": trial, "kind": "evaluation"})
    return uri


@contextlib.contextmanager
def serve(uri, folder, seconds=90):
    """`mlflow ui` over a store, while the context lasts; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    address, log = f"http://127.0.0.1:{port}", Path(folder, "server.log")
    with log.open("w") as output:
        # In a group of its own: it has children, and they end with it.
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + seconds
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
                if urllib.request.urlopen(f"{address}/health", timeout=5).status == 200:
                    break
            time.sleep(0.1)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    with serve(store, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """Chromium: playwright's own where that was downloaded, else the system's."""
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = [own, "chromium", "chromium-browser", "google-chrome"]
        program = next((path for name in names if (path := shutil.which(name))), None)
        if program is None:
            pytest.skip("no Chromium here (Debian: apt install chromium; elsewhere: playwright install chromium)")
        # Chromium refuses to sandbox what root starts, as in most containers.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=program, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    """A page of a browser that remembers nothing of other tests; its last state is left in tmp_path."""
    context = browser.new_context(viewport={"width": 1400, "height": 800})
    context.add_init_script(SEEN_BEFORE)
    page = context.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.screenshot(path=tmp_path / "last.png")
    context.close()


def open_experiment(page, address, experiment):
    """From the start page to the experiment's list of runs."""
    page.goto(address)
    # MLflow 3 opens on its pages for language models, which show no curves; the browser remembers the choice.
    page.get_by_role("button", name="Model training").click()
    page.get_by_role("link", name=experiment, exact=True).click()
    page.get_by_role("columnheader", name="Run Name").first.wait_for()


def run_link(page, name):
    return page.get_by_role("link", name=name, exact=True)


def unfold(page, name):
    """Click the + beside a run that has others below it."""
    page.get_by_role("gridcell").filter(has=run_link(page, name)).get_by_role("button").click()


def drawn(page, metric, names):
    """Run name -> x, y, color, width and height of its line in that metric's chart; waits for those of `names`."""
    # Where one doesn't come, the caller is told which ones did.
    with contextlib.suppress(sync_api.TimeoutError):
        page.wait_for_function(
            f"([metric, names]) => {{ const lines = ({DRAWN})(metric); return names.every(name => name in lines); }}",
            arg=[metric, list(names)],
        )
    return page.evaluate(DRAWN, metric)


def compare_view(page, address, experiment, run_names, metric, below=()):
    """Tick the runs, *Compare*, click the metric's name; returns what drawn() says.

    Args:
        page: of a browser.
        address: of the MLflow server.
        experiment: its name.
        run_names: of the runs to tick.
        metric: whose curves to look at.
        below: names of the runs to unfold before, outermost first; a sweep's, where the runs are its trials. Not one of those
            to tick: what is unfolded below a run is ticked with it.
    """
    open_experiment(page, address, experiment)
    for name in below:
        unfold(page, name)
    for name in run_names:
        row = page.get_by_role("row").filter(has=run_link(page, name))
        row.get_by_role("checkbox", name="toggle row selection").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("heading", name=f"Comparing {len(run_names)} Runs").wait_for()
    page.wait_for_function(SCROLLED_TO, arg=metric)
    page.get_by_role("link", name=metric, exact=True).click()
    page.get_by_role("heading", name=metric, level=2).wait_for()
    return drawn(page, metric, run_names)


def check_lines(lines, metric):
    """Both trials are there and nothing else is, each as a line through its own run's points."""
    assert set(lines) == {PLAIN, ROTATION}
    for name, weight in ((PLAIN, 0.0), (ROTATION, 1.0)):
        points = curves()[weight]
        assert len(points) == 10 and lines[name]["x"] == sorted(points)
        assert lines[name]["y"] == [points[epoch][metric] for epoch in sorted(points)]
        assert lines[name]["width"] > 100 and lines[name]["height"] > 20, "drawn, but not to be seen"


def test_compare_draws_both_curves(page, server, tmp_path):
    lines = compare_view(page, server, EXPERIMENT, [PLAIN, ROTATION], "knn/top1", below=[SWEEP])
    check_lines(lines, "knn/top1")
    for name in lines:
        sync_api.expect(page.get_by_text(f"{name} (knn/top1)", exact=True)).to_be_visible()
    sync_api.expect(page.get_by_role("dialog")).to_have_count(0)
    page.mouse.move(0, 0)  # a pointer over the chart opens a box of numbers
    picture = tmp_path / "compare.png"
    page.screenshot(path=picture, animations="disabled")
    if wanted := os.environ.get("ROTSSL_SCREENSHOT"):
        assert lines[PLAIN]["color"] != lines[ROTATION]["color"], (
            "no picture to show: one colour for both; run it again"
        )
        shutil.copyfile(picture, wanted)


def test_two_clicks_show_the_curves_of_a_sweep(page, server):
    open_experiment(page, server, EXPERIMENT)
    unfold(page, SWEEP)
    # The icon has no name; its button has a value.
    page.locator("label").filter(has=page.locator("input[value=CHART]")).click()
    for metric in ("knn/top1", "loss/ssl"):
        # A chart is drawn when it comes into view; the search brings it there without scrolling.
        page.get_by_placeholder("Search metric charts").fill(metric)
        lines = drawn(page, metric, [PLAIN, ROTATION])
        check_lines(lines, metric)
        for name, color in COLORS.items():
            assert lines[name]["color"] == "rgb({}, {}, {})".format(*bytes.fromhex(color[1:]))


def test_evaluation_is_nested_under_its_trial(page, server):
    open_experiment(page, server, EXPERIMENT)
    left = []
    for name, below in ((SWEEP, ROTATION), (ROTATION, EVALUATION)):
        sync_api.expect(run_link(page, name)).to_be_visible()
        sync_api.expect(run_link(page, below)).to_have_count(0)
        unfold(page, name)
    for name in (SWEEP, ROTATION, EVALUATION):
        sync_api.expect(run_link(page, name)).to_be_visible()
        left.append(run_link(page, name).bounding_box()["x"])
    assert left[0] < left[1] < left[2], "each level is further to the right"
