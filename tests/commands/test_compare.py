"""From MLflow to the report: reading, writing, the command line."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rotssl.commands.compare import compare, default_output, show
from rotssl.config.fields import ConfigError
from rotssl.tracking import reader, writer
from rotssl.tracking import store as store_
from tests.programs import ROOT, command, with_store
from tests.reports.made_up import rotated, run, seeds

pytestmark = pytest.mark.contract
METRICS = ("knn/top1", "feature/std", "loss/ssl", "cost/epochs", "cost/flops", "cost/device_seconds")
NASTY = "<img src=x onerror=\"alert(1)\"> & [/bold] 'quoted'"


class Store:
    """An sqlite store in a folder, filled as a run's driver and engine do it."""

    def __init__(self, folder):
        self.folder, self.uri = with_store(folder), store_.default_uri(str(folder))

    def open(self, experiment, name, params, tags):
        return writer.open_run(self.uri, experiment, name, None, params, tags, self.folder / "artifacts")

    def add(self, experiment, record, **tags):
        run_id = self.open(experiment, record.name, record.params, {**record.tags, **tags})
        tracker = writer.Tracker(self.uri, run_id)
        assert tracker.sync(record.points) and tracker.finish(record.status, record.tags["status_reason"], [])
        return run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Experiments: ``plain runs``; ``sweeps``, with two sweeps; ``single``, of one run; ``nasty``; ``empty``."""
    found = Store(tmp_path_factory.mktemp("store"))
    for record in seeds(2):
        found.add("plain runs", record)
    sweep = found.open("sweeps", "weights", {}, {"kind": "sweep"})
    found.trials = [found.add("sweeps", r, kind="trial", **{"mlflow.parentRunId": sweep}) for r in seeds(2)]
    found.add("sweeps", run(status="FINISHED"), kind="evaluation", **{"mlflow.parentRunId": found.trials[0]})
    found.other = found.open("sweeps", "other", {}, {"kind": "sweep"})
    found.add("sweeps", rotated((0.2, 0.3), weight=5), kind="trial", **{"mlflow.parentRunId": found.other})
    found.add("sweeps", run((0.2, 0.1)), kind="trial", **{"mlflow.parentRunId": found.other})
    found.sweep = sweep
    found.add("single", run())
    failed = rotated((0.3,), train__epochs=4, status="FAILED", reason=f"worker said {NASTY}", name=NASTY)
    for record in (*seeds(2), failed):
        found.add("nasty", record, device=NASTY)
    found.open("empty", "sweep", {}, {"kind": "sweep"})
    return found


def test_runs_come_back_as_they_were_logged(store):
    records = reader.read_runs(store.uri, "plain runs", METRICS)
    assert [record.name for record in records] == [record.name for record in seeds(2)]
    for got, logged in zip(records, seeds(2), strict=True):
        assert got.params == logged.params and got.points == logged.points
        assert (got.status, got.parent, got.tags["status_reason"]) == ("FINISHED", None, "completed")
    only = reader.read_runs(store.uri, "plain runs", ["cost/flops"])
    assert {key for record in only for point in record.points.values() for key in point} == {"cost/flops"}
    trials = reader.read_runs(store.uri, "sweeps", METRICS)
    assert [r.run_id for r in trials if r.parent == store.sweep] == store.trials
    assert all(not r.points for r in trials if r.tags.get("kind") in ("sweep", "evaluation"))


def test_of_two_points_of_an_epoch_the_first_logged_stands(store):
    from mlflow.tracking import MlflowClient

    run_id = store.add("twice", run())
    client = MlflowClient(store.uri)
    logged = client.get_metric_history(run_id, "knn/top1")[1]
    for shift, value in ((5000, 0.9), (-5000, 0.1)):
        client.log_metric(run_id, "knn/top1", value, logged.timestamp + shift, logged.step)
    (record,) = reader.read_runs(store.uri, "twice", METRICS)
    assert [point["knn/top1"] for _, point in sorted(record.points.items())] == [0.2, 0.1, 0.5, 0.6]


def test_all_pages_are_read_and_deleted_runs_are_not(store, monkeypatch):
    from mlflow.tracking import MlflowClient

    ids = [store.open("many", f"run{i}", {}, {}) for i in range(5)]
    whole = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient,
        "search_runs",
        lambda self, ids, page_token=None: whole(self, ids, max_results=2, page_token=page_token),
    )
    assert [record.run_id for record in reader.read_runs(store.uri, "many", METRICS)] == ids
    MlflowClient(store.uri).delete_run(ids[1])
    assert [record.run_id for record in reader.read_runs(store.uri, "many", METRICS)] == [ids[0], *ids[2:]]


def test_a_store_that_is_not_there_is_refused_and_not_made(tmp_path):
    file = tmp_path / "none.db"
    with pytest.raises(ConfigError, match=r"none\.db"):
        reader.read_runs(f"sqlite:///{file}", "any", METRICS)
    assert not file.exists()
    file.write_text("this is no database, whatever its name says, and it is long enough to have a header" * 20)
    for uri in (f"sqlite:///{file}", "ftp://x", "sqlite:///", "http://127.0.0.1:9"):
        with pytest.raises(ConfigError) as caught:
            reader.read_runs(uri, "any", METRICS)
        assert len(str(caught.value).splitlines()) == 1


def test_an_experiment_that_is_not_there_is_refused_with_the_known_ones(store):
    with pytest.raises(ConfigError, match=r"plain runs.*did you mean 'single'"):
        reader.read_runs(store.uri, "singel", METRICS)


def without_seconds(content):
    """The part of a report that does not depend on measured time or on ids."""
    if isinstance(content, dict):
        kept = {k: v for k, v in content.items() if "seconds" not in k and k not in ("run_id", "started", "experiment")}
        return {key: without_seconds(value) for key, value in kept.items()}
    return [without_seconds(value) for value in content] if isinstance(content, list) else content


def test_the_report_of_plain_runs(store, tmp_path):
    report = compare(store.uri, "plain runs", tmp_path / "new" / "out")
    assert report.logged_to is None
    assert [path.name for path in report.files] == ["report.html", "report.json", "convergence.png", "final.png"]
    content = json.loads(report.files[1].read_text())
    _, ours = content["budgets"]
    assert ours["gain"]["value"] == pytest.approx(0.2) and ours["reach"]["epochs"]["reached"] == 2
    assert content["recommendations"][0]["best"] == "rotation weight 1"
    assert content["recommendations"][0]["ranking"]["seeds"] == [0, 1]
    assert ours["reach"]["epochs"]["bound"] is None and ours["reach"]["epochs"]["speed_up"]["is_range"]
    assert "slow each other down" in report.files[0].read_text()
    assert [entry["final"] for entry in content["runs"]] == pytest.approx([0.6, 0.61, 0.8, 0.81])
    assert "device_seconds" in content["equal"] and "device time" in content["recommendations"][0]["text_seconds"][0]
    assert not any("device time" in line for line in content["recommendations"][0]["text"])


def test_two_reports_are_equal_but_for_times(store, tmp_path):
    slow = seeds(2)
    for record in slow:
        for point in record.points.values():
            point["cost/device_seconds"] *= 1.7
    for record in slow[::-1]:
        store.add("again", record)
    first, again = (compare(store.uri, name, tmp_path / name).content for name in ("plain runs", "again"))
    assert json.dumps(first, sort_keys=True) != json.dumps(again, sort_keys=True)
    assert without_seconds(json.loads(json.dumps(first))) == without_seconds(json.loads(json.dumps(again)))


def test_the_report_of_a_sweep_is_logged_to_it(store, tmp_path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store.uri)
    report = compare(store.uri, "sweeps", tmp_path, sweep="weights")
    assert report.logged_to == store.sweep and len(report.comparison.cells) == 2
    names = {item.path for item in client.list_artifacts(store.sweep, "report")}
    assert {f"report/{path.name}" for path in report.files} == names and len(names) == 4
    # The same by the ids of its trials; all runs together belong to no one sweep.
    chosen = compare(store.uri, "sweeps", tmp_path, only=set(store.trials))
    assert (chosen.content, chosen.logged_to) == (report.content, store.sweep)
    assert compare(store.uri, "sweeps", tmp_path).logged_to is None
    assert compare(store.uri, "sweeps", tmp_path, only=set(store.trials), parent=store.other).logged_to == store.other
    assert client.list_artifacts(store.other, "report")


def test_a_trial_of_two_sweeps_counts_in_both(store, tmp_path, caplog):
    shared, ours = seeds(1)
    sweeps = [store.open("shared", name, {}, {"kind": "sweep"}) for name in ("first", "second", "third", "broken")]
    plain = store.add("shared", shared, kind="trial", **{"mlflow.parentRunId": sweeps[0]})
    ids = [store.add("shared", ours, kind="trial", **{"mlflow.parentRunId": sweeps[0]})]
    for sweep in sweeps[1:]:
        other = rotated((0.2, 0.3, 0.4, 0.5), weight=sweeps.index(sweep) / 10, started=sweeps.index(sweep))
        ids.append(store.add("shared", other, kind="trial", **{"mlflow.parentRunId": sweep}))
    for i, text in ((1, json.dumps([plain, ids[1]])), (2, json.dumps([plain])), (3, "[no list")):
        (tmp_path / "trials.json").write_text(text)
        assert writer.Tracker(store.uri, sweeps[i]).finish("FINISHED", "completed", [tmp_path / "trials.json"])
    assert [reader.trial_ids(store.uri, sweep) for sweep in sweeps[:3]] == [set(), {plain, ids[1]}, {plain}]

    def counted(sweep):
        report = compare(store.uri, "shared", tmp_path / sweep, sweep=sweep)
        assert report.logged_to == sweeps[("first", "second", "third").index(sweep)]
        return {entry["run_id"] for entry in report.content["runs"]}

    assert counted("first") == {plain, ids[0]}
    assert counted("second") == {plain, ids[1]}  # the list repeats its own trial
    assert counted("third") == {plain, ids[2]}  # the list and the children
    assert caplog.text == "" and reader.trial_ids(store.uri, sweeps[3]) == set() and "could not read" in caplog.text


def test_a_report_that_cannot_be_logged_is_a_warning(store, tmp_path, caplog):
    report = compare(store.uri, "plain runs", tmp_path, parent="0" * 32)
    assert report.logged_to is None and "could not log" in caplog.text and report.files[0].exists()


@pytest.mark.parametrize(
    ("experiment", "more", "named"),
    [
        ("single", {}, "the same configuration"),
        ("empty", {}, "no complete run with knn/top1"),
        ("plain runs", {"metric": "linear/top1"}, "w0-e4-s0: no linear/top1"),
        ("plain runs", {"only": set()}, "nothing to compare"),
        ("plain runs", {"baseline": "rotation.weight=3"}, "rotation.weight"),
        ("sweeps", {"sweep": "weight"}, "weights"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(store, tmp_path, experiment, more, named):
    with pytest.raises(ConfigError, match=named):
        compare(store.uri, experiment, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        compare(store.uri, "plain runs", tmp_path / "file" / "out")


class Checker(HTMLParser):
    """Collects tags and texts, and sees that what is opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_escapes_what_mlflow_holds(store, tmp_path, capsys):
    report = compare(store.uri, "nasty", tmp_path)
    page = report.files[0].read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    images = [attrs for tag, attrs in checker.tags if tag == "img"]
    assert len(images) == 2 and all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in checker.tags}
    assert not any(
        key in ("src", "href") and not value.startswith("data:") for _, a in checker.tags for key, value in a.items()
    )
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert checker.text.count(NASTY) >= 3  # the run's name, its reason, the device
    show(report)
    printed = capsys.readouterr().out
    assert "[/bold]" in printed and "Left out" in printed and str(report.files[0]) in printed.replace("\n", "")
    assert max(map(len, printed.splitlines()[:-6])) <= 110


def test_the_same_numbers_stand_in_the_terminal_and_on_the_page(store, tmp_path, capsys):
    report = compare(store.uri, "plain runs", tmp_path)
    show(report)
    printed, page = capsys.readouterr().out, report.files[0].read_text()
    for text in ("80.5%", "+20.0", "1.58x", "take rotation weight 1"):
        assert text in printed and text in page, text


def test_several_families_have_a_picture_each(store, tmp_path):
    for method in ("byol", "simclr"):
        for record in (
            run(method__name=method, name=f"{method}0"),
            rotated((0.3, 0.9), method__name=method, name=method),
        ):
            store.add("families", record)
    names = [path.name for path in compare(store.uri, "families", tmp_path).files]
    assert names[2:] == ["convergence-1-byol.png", "convergence-2-simclr.png", "final.png"]


def test_the_default_folder_is_beside_the_store(monkeypatch):
    assert default_output("sqlite:////data/results/mlflow.db", "a/b c") == Path("/data/results/report-a-b-c")
    assert default_output("http://host:5000", "demo") == Path("report-demo")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--experiment"),
        ("--experiment", "--experiment"),
        ("--experiment x --target 70", "--target"),
        ("--experiment x --target nan", "--target"),
        ("--experiment x --target 0", "--target"),
        ("--experiment x --metric top1", "knn/top1"),
        ("--experiment x --exp y", "--exp"),
        ("--experiment x", "results/mlflow.db"),
        ("--experiment x --uri ftp://x", "ftp://x"),
        ("--experiment x --uri off", "--uri: got off"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, monkeypatch, main, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    code, out, err = main("compare.py", *arguments.split())
    assert code == 2 and out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and named in err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_found_without_heavy_imports(tmp_path):
    code = "import sys; sys.argv[1:] = ['--experiment', 'x', '--target', '7']\nimport runpy\ntry:\n"
    code += f"    runpy.run_path({str(ROOT / 'jobs' / 'compare.py')!r}, run_name='__main__')\n"
    code += "except SystemExit as end:\n    heavy = {'mlflow', 'matplotlib', 'numpy', 'scipy', 'torch', 'ray'}\n"
    code += "    print(end.code, sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 []\n", done.stderr


def test_the_job_finds_the_store_and_prints_the_answer(store, tmp_path):
    arguments = (
        "--experiment",
        "plain runs",
        "--baseline",
        "rotation.weight=0",
        "--target",
        "0.55",
        "--output",
        tmp_path / "out",
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store.uri}
    done = subprocess.run(command("compare.py", *arguments), env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "take rotation weight 1" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["target"] == 0.55
    assert not (tmp_path / "results").exists()
