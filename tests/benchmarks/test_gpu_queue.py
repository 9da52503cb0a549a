"""The queue of benchmarks/gpu.py: what is run when, and that what was found survives whatever ends a cell or the whole."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


def cell(name, test, minutes=0.5, **more):
    return {
        "name": name,
        "kind": "pytest",
        "minutes": minutes,
        "answers": "?",
        "smoke": {"minutes": minutes},
        **more,
    } | {"args": {"paths": [str(test)]}}


@pytest.fixture
def queue(tmp_path):
    """Writes a queue of tests, given by their text; returns the options that run it."""

    def write(**tests):
        cells = []
        for name, (body, minutes) in tests.items():
            file = tmp_path / f"test_{name}.py"
            file.write_text(f"import os, time\n\n\n{body}\n")
            cells.append(cell(name, file, minutes))
        (tmp_path / "queue.yaml").write_text(yaml.safe_dump(cells))
        return ["--queue", str(tmp_path / "queue.yaml"), "--device", "cpu", "--output", str(tmp_path / "out")]

    return write


def start(options, minutes=3.0):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--minutes", str(minutes), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(folder):
    path = folder / "out" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


NAMES = ("first", "second", "third")
GOOD = "def test_good():\n    pass"
BAD = "def test_bad():\n    raise ValueError(150 * 'x' + ' at the end')"
HANGS = "def test_first():\n    pass\n\n\ndef test_hangs():\n    time.sleep(600)"


def test_the_queue_is_valid_and_each_kind_runs_in_miniature(gpu):
    whole, small = (gpu.read_queue(gpu.QUEUE, smoke) for smoke in (False, True))
    assert [each.name for each in whole] == [each.name for each in small]
    assert {each.kind for each in whole} == {*gpu.gpu_queue.KINDS}
    first = {each.kind: each for each in reversed(small)}
    assert sum(each.minutes for each in first.values()) <= 5
    # What is to be known first: does it run, how fast, what of it; in the first ten minutes or so.
    assert [each.kind for each in whole[:5]] == ["pytest", "ray", "speed", "profile", "lightly"]
    assert sum(each.minutes for each in whole if each.kind not in ("levers", "equal_minutes", "train")) < 11
    for each in whole:
        for path in (each.args.get("recipe"), *each.args.get("paths", ())):
            assert path is None or (gpu.ROOT / path).exists(), path


def test_each_kind_has_its_function(gpu):
    import gpu_cells

    assert {*gpu_cells.MODULES} == {*gpu.gpu_queue.KINDS}
    for kind, module in gpu_cells.MODULES.items():
        assert callable(getattr(importlib.import_module(module), kind))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "dance"}, "kind: got 'dance', expected one of pytest, ray"),
        ({"needs": ["a miracle"]}, "needs: got ['a miracle'], expected a list of ray, lightly"),
        ({"name": "first"}, "name: first is there twice"),
        ({"name": "../first"}, "name: got '../first'"),
        ({"colour": "red"}, "unknown field colour"),
        ({"minutes": "3"}, "minutes: got '3', expected a number above 0"),
        ({"least": 2}, "least: got 2, expected at most the cell's 0.5 minutes"),
        ({"args": {"pahts": []}}, "args: pytest has no pahts; it has options, paths"),
        ({"smoke": {"minutes": 1, "args": {"pahts": []}}}, "smoke: args: pytest has no pahts"),
        ({"smoke": {}}, "smoke: got {}, expected minutes above 0"),
    ],
)
def test_a_bad_queue_is_refused_in_a_line(gpu, tmp_path, capsys, change, words):
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([cell("first", "x"), cell("second", "x") | change]))
    assert dry(gpu, tmp_path) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: queue.yaml, cell 2: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "three: cells", "", "- 1"])
def test_what_is_no_queue_is_refused_in_a_line(gpu, tmp_path, capsys, text):
    (tmp_path / "queue.yaml").write_text(text)
    assert dry(gpu, tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


def dry(gpu, folder, *options):
    files = ["--queue", str(folder / "queue.yaml"), "--output", str(folder / "out"), "--bundle", str(folder / "bundle")]
    return gpu.main(["--minutes", "3", "--device", "cpu", "--dry-run", *files, *options])


def test_the_plan_says_what_fits_what_is_done_and_what_is_missing(gpu, tmp_path, capsys):
    cells = [cell("done", "x"), cell("short", "x", 2), cell("long", "x", 2), cell("small", "x", 1)]
    cells += [cell("resumable", "x", 9) | {"least": 1}, cell("elsewhere", "x") | {"needs": ["lightly", "ray"]}]
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump(cells))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "site.list").write_text("lightly-1.5\nray-2.6\npyarrow-9\n")
    known = tmp_path / "known"
    known.mkdir()
    gpu.Results(known).add({"name": "done", "status": "done", "device": {"type": "cpu"}, "smoke": False})
    find = gpu.gpu_facts.importlib.util.find_spec
    missing = ("lightly", "ray", "pandas", "pyarrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find(name))
        patch.setenv("ROTSSL_DATA", str(tmp_path))
        assert dry(gpu, tmp_path, "--known", str(tmp_path / "nothing"), "--known", str(known)) == 0
    told = [line.split("?")[0].split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(words) for words in told if words[0] != "missing"] == [
        "done done before",
        "short 2 min",
        "long 2 min, not now",
        "small 1 min",
        "resumable 9 min, not now",
        "elsewhere no ray here",  # pandas is neither here nor in the bundle
    ]
    assert "CIFAR-10's archive," in " ".join(told[-1])
    assert not (tmp_path / "out").exists()


def test_cells_run_if_they_fit_and_those_that_go_on_later_in_what_is_left(gpu):
    whole, resumable = gpu.Cell("a", "train", 5, "?"), gpu.Cell("b", "train", 5, "?", least=1)
    assert whole.fits(301) and not whole.fits(299) and resumable.fits(61) and not resumable.fits(59)
    assert (
        whole.limit(10_000) == 2 * 300 + gpu.gpu_queue.SLACK_S
        and whole.limit(400) == 400
        and resumable.limit(10_000) == 10_000
    )


def test_only_what_is_done_here_at_this_size_is_not_run_again(gpu, tmp_path):
    one = gpu.Cell("a", "train", 5, "?")
    results = gpu.Results(tmp_path)
    for status, device, smoke in (("cut", "cuda", False), ("done", "cpu", False), ("done", "cuda", True)):
        results.add({"name": "a", "status": status, "device": {"type": device}, "smoke": smoke})
        assert not gpu.Results(tmp_path).done(one, "cuda", False)
    results.add({"name": "a", "status": "done", "device": {"type": "cuda"}, "smoke": False})
    with results.path.open("a") as file:
        file.write('{"name": "b", "sta')  # cut short
    later = tmp_path / "later"
    assert gpu.Results(later, [tmp_path]).done(one, "cuda", False)
    gpu.Results(tmp_path).add({"name": "c", "status": "done", "device": {"type": "cuda"}, "smoke": False})
    assert gpu.Results(tmp_path).lines[-1]["name"] == "c"  # it does not stand in the line that was cut short


def test_trainings_are_taken_up_from_where_they_were_kept_but_not_over_newer_ones(gpu, tmp_path):
    known, scratch = tmp_path / "known", tmp_path / "scratch"
    for folder, name, text in ((known, "a", "old"), (known, "b", "old"), (scratch, "b", "new")):
        (folder / "runs" / name / "run").mkdir(parents=True)
        (folder / "runs" / name / "run" / "metrics.jsonl").write_text(text)
    (scratch / "runs" / "b" / "run" / "epoch_00009").mkdir()
    gpu.take_up([known, tmp_path / "nothing"], scratch)
    told = {name: (scratch / "runs" / name / "run" / "metrics.jsonl").read_text() for name in ("a", "b")}
    assert told == {"a": "old", "b": "new"}
    assert sorted(path.name for path in (scratch / "runs").iterdir()) == ["a", "b"]


@pytest.mark.system
def test_results_are_on_disk_as_they_come_and_the_next_call_runs_the_rest(queue, tmp_path):
    options = queue(first=(GOOD, 0.5), second=(HANGS, 1), third=(GOOD, 0.5))
    runner = start(options)
    hanging = tmp_path / "out-scratch" / "second.result.json"
    while not (hanging.exists() and "test_hangs" not in hanging.read_text() and "passed" in hanging.read_text()):
        assert runner.poll() is None, runner.stdout.read()
        time.sleep(0.05)
    (cell,) = psutil.Process(runner.pid).children()
    runner.kill()
    runner.wait()
    while cell.is_running():  # it does not take the next call's time
        time.sleep(0.05)
    assert [(line["name"], line["status"]) for line in lines(tmp_path)] == [("first", "done")]
    options = queue(first=(GOOD, 0.5), second=(GOOD, 0.5), third=(GOOD, 0.5))
    again = start(options)
    told, _ = again.communicate()
    assert again.returncode == 0 and "first: done before" in told and "- counts, passed: 1" in told
    found = lines(tmp_path)
    assert [(line["name"], line["status"]) for line in found] == [(name, "done") for name in NAMES]
    for key in ("answers", "started", "seconds", "device", "versions", "host", "commit", "code", "smoke"):
        assert all(key in line for line in found), key
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"## {name}" in report for name in NAMES) and "counts, passed: 1" in report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "report.md", "results.jsonl"]


@pytest.mark.exhaustive
def test_what_hangs_or_crashes_costs_itself_alone_and_what_it_had_is_kept(queue, tmp_path):
    crash = "def test_crash():\n    os.kill(os.getppid(), 9)\n    time.sleep(600)"
    options = queue(first=(HANGS, 0.1), second=(crash, 0.2), third=(BAD, 0.2), last=(GOOD, 0.2))
    slack = "import sys, gpu; gpu.gpu_queue.SLACK_S = 0; gpu.GRACE_S = 2; sys.exit(gpu.main(sys.argv[1:]))"
    command = [sys.executable, "-c", slack, "--minutes", "3", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(FOLDER)), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third, last = lines(tmp_path)
    assert (first["status"], first["reason"], first["result"]["counts"]) == ("cut", "deadline", {"passed": 1})
    assert second["status"] == "failed" and second["reason"].startswith("ended with -9")
    assert third["status"] == "done" and third["result"]["counts"] == {"failed": 1}
    (failure,) = third["result"]["failures"]
    assert (
        failure["test"].endswith("::test_bad")
        and failure["reason"].endswith("x at the end")
        and last["status"] == "done"
    )


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_ctrl_c_ends_the_cell_and_writes_what_it_had(queue, tmp_path, number):
    runner = start(queue(first=(HANGS, 1), second=(GOOD, 0.5)))
    hanging = tmp_path / "out-scratch" / "first.result.json"
    while not (hanging.exists() and "passed" in hanging.read_text()):
        assert runner.poll() is None, runner.stdout.read()
        time.sleep(0.05)
    runner.send_signal(number)
    assert runner.wait() == 130
    assert [(line["status"], line["reason"], line["result"]["counts"]) for line in lines(tmp_path)] == [
        ("cut", "interrupted", {"passed": 1})
    ]


@pytest.mark.system
@pytest.mark.parametrize("error", ["ImportError", pytest.param("OSError", marks=pytest.mark.exhaustive)])
def test_a_cell_without_what_it_needs_says_so(queue, tmp_path, error):
    options = queue(first=(GOOD, 0.5))
    content = yaml.safe_load((tmp_path / "queue.yaml").read_text())
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([content[0] | {"needs": ["lightly"]}]))
    (tmp_path / "lightly.py").write_text(f"raise {error}('not here')")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), "--minutes", "2", "--bundle", str(tmp_path / "no"), *options],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )
    assert done.returncode == 1, done.stdout  # no cell came to a figure
    (line,) = lines(tmp_path)
    assert line["status"] == "not run" and "needs lightly" in line["reason"] and "(not here)" in line["reason"]


def test_what_is_not_installed_comes_from_the_bundle(gpu, monkeypatch, tmp_path):
    (tmp_path / "lightly.py").write_text("ours = True")
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as file:
        file.add(tmp_path / "lightly.py", "lightly.py")
    site = gpu.gpu_facts.unpack(tmp_path, tmp_path / "scratch")
    assert site == tmp_path / "scratch" / "site" and (site / "lightly.py").exists()
    assert gpu.gpu_facts.unpack(tmp_path / "nothing", tmp_path / "scratch") is None
    monkeypatch.setenv("PYTHONPATH", "theirs")
    find = gpu.gpu_facts.importlib.util.find_spec
    ours = [str(gpu.ROOT), str(gpu.ROOT / "benchmarks"), "theirs"]
    for installed, expected in ((True, ours), (False, [str(site), *ours])):
        known = "json" if installed else "nowhere"
        monkeypatch.setattr("importlib.util.find_spec", lambda name, known=known: find(known))
        assert gpu.gpu_facts.import_path(["lightly"], site).split(os.pathsep) == expected
        assert gpu.gpu_facts.import_path([], site).split(os.pathsep) == ours


@pytest.mark.parametrize(
    ("ended", "code"),
    [([], 0), (["failed", "not run"], 1), (["failed", "cut"], 0), (["done", "failed"], 0)],
)
def test_the_exit_code_says_whether_there_is_a_figure(gpu, monkeypatch, tmp_path, ended, code):
    monkeypatch.setattr(gpu, "Runner", lambda args: SimpleNamespace(ended=ended, facts={}, run=lambda cells: None))
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([cell("a", "x")]))
    options = ["--queue", str(tmp_path / "queue.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert gpu.main(["--minutes", "1", *options]) == code


@pytest.mark.system
def test_a_device_that_is_not_here_is_told_in_a_line(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([cell("a", "x")]))
    options = ["--queue", str(tmp_path / "queue.yaml"), "--output", str(tmp_path / "out"), "--device", "cuda"]
    assert gpu.main(["--minutes", "1", *options]) == 2
    assert capsys.readouterr().err == "error: --device: got cuda, but torch sees no GPU here\n"


def test_a_log_keeps_its_end(gpu, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("first\n" + "x" * 90 + "\n\nlast\n")
    assert gpu.gpu_facts.tail(log, 0, 2) == "x" * 90 + "\nlast" and gpu.gpu_facts.tail(log, 6, 9) == "x" * 90 + "\nlast"
    gpu.gpu_facts.shorten(log, 200)
    assert log.read_text().startswith("first")
    gpu.gpu_facts.shorten(log, 100)
    assert len(log.read_bytes()) < 70 and log.read_text().endswith("last\n")
