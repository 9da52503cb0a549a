"""The queue of benchmarks/gpu.py: what is run when, and that what was found survives whatever ends a cell or the whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

FOLDER = Path(__file__).parent.parent / "benchmarks"


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


GOOD = "def test_good():\n    pass"
HANGS = "def test_first():\n    pass\n\n\ndef test_hangs():\n    time.sleep(600)"


def test_the_queue_is_valid_and_each_kind_runs_in_miniature(gpu):
    whole, small = (gpu.read_queue(gpu.QUEUE, smoke) for smoke in (False, True))
    assert [each.name for each in whole] == [each.name for each in small] and {each.kind for each in whole} == set(
        gpu.KINDS
    )
    first = {each.kind: each for each in reversed(small)}
    assert sum(each.minutes for each in first.values()) <= 5
    # What is to be known first: does it run, how fast, what of it; in the first ten minutes or so.
    assert [each.kind for each in whole[:5]] == ["pytest", "ray", "speed", "profile", "lightly"]
    assert sum(each.minutes for each in whole if each.kind not in ("equal_minutes", "train")) < 11
    for each in whole:
        for path in (each.args.get("recipe"), *each.args.get("paths", ())):
            assert path is None or (gpu.ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "dance"}, "got kind 'dance'"),
        ({"needs": ["a miracle"]}, "needs ['a miracle']"),
        ({"name": "first"}, "first is there twice"),
        ({"colour": "red"}, "expected name, kind, minutes"),
    ],
)
def test_a_bad_queue_is_refused_in_a_line(gpu, tmp_path, change, words):
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([cell("first", "x"), cell("second", "x") | change]))
    with pytest.raises(SystemExit) as ended:
        gpu.read_queue(tmp_path / "queue.yaml", smoke=False)
    assert str(ended.value).startswith("queue.yaml, cell 2: ") and words in str(ended.value)


def test_cells_run_if_they_fit_and_those_that_go_on_later_in_what_is_left(gpu):
    whole, resumable = gpu.Cell("a", "train", 5, "?"), gpu.Cell("b", "train", 5, "?", least=1)
    assert whole.fits(301) and not whole.fits(299) and resumable.fits(61) and not resumable.fits(59)
    assert (
        whole.limit(10_000) == 2 * 300 + gpu.SLACK_S and whole.limit(400) == 400 and resumable.limit(10_000) == 10_000
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


def test_results_are_on_disk_as_they_come_and_the_next_call_runs_the_rest(queue, tmp_path):
    options = queue(first=(GOOD, 0.5), second=(HANGS, 1), third=(GOOD, 0.5))
    runner, end = start(options), time.monotonic() + 120
    hanging = tmp_path / "out-scratch" / "second.result.json"
    while not (hanging.exists() and "test_hangs" not in hanging.read_text() and "passed" in hanging.read_text()):
        assert time.monotonic() < end and runner.poll() is None, runner.stdout.read()
        time.sleep(0.05)
    (cell,) = psutil.Process(runner.pid).children()
    runner.kill()
    runner.wait()
    while cell.is_running():  # it does not take the next call's time
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [(line["name"], line["status"]) for line in lines(tmp_path)] == [("first", "done")]
    options = queue(first=(GOOD, 0.5), second=(GOOD, 0.5), third=(GOOD, 0.5))
    again = start(options)
    told, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "first: done before" in told
    found = lines(tmp_path)
    assert [(line["name"], line["status"]) for line in found] == [
        (name, "done") for name in ("first", "second", "third")
    ]
    for key in ("answers", "started", "seconds", "device", "versions", "host", "commit", "code", "smoke"):
        assert all(key in line for line in found), key
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"## {name}" in report for name in ("first", "second", "third")) and "counts, passed: 1" in report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "report.md", "results.jsonl"]


def test_what_hangs_or_crashes_costs_itself_alone_and_what_it_had_is_kept(queue, tmp_path):
    crash = "def test_crash():\n    os.kill(os.getppid(), 9)\n    time.sleep(600)"
    options = queue(
        first=(HANGS, 0.1), second=(crash, 0.2), third=("def test_bad():\n    assert 1 == 2", 0.2), last=(GOOD, 0.2)
    )
    slack = "import runpy, sys, gpu; gpu.SLACK_S = 0; gpu.GRACE_S = 2; sys.exit(gpu.main(sys.argv[1:]))"
    command = [sys.executable, "-c", slack, "--minutes", "3", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=dict(os.environ, PYTHONPATH=str(FOLDER)), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third, last = lines(tmp_path)
    assert (first["status"], first["reason"], first["result"]["counts"]) == ("cut", "deadline", {"passed": 1})
    assert second["status"] == "failed" and second["reason"].startswith("ended with -9")
    assert third["status"] == "done" and third["result"]["counts"] == {"failed": 1}
    assert "assert 1 == 2" in third["result"]["failures"][0]["reason"] and last["status"] == "done"


def test_ctrl_c_ends_the_cell_and_writes_what_it_had(queue, tmp_path):
    runner, end = start(queue(first=(HANGS, 1), second=(GOOD, 0.5))), time.monotonic() + 120
    hanging = tmp_path / "out-scratch" / "first.result.json"
    while not (hanging.exists() and "passed" in hanging.read_text()):
        assert time.monotonic() < end and runner.poll() is None, runner.stdout.read()
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=60) == 130
    assert [(line["status"], line["reason"], line["result"]["counts"]) for line in lines(tmp_path)] == [
        ("cut", "interrupted", {"passed": 1})
    ]


def test_a_cell_without_what_it_needs_says_so(queue, tmp_path):
    options = queue(first=(GOOD, 0.5))
    content = yaml.safe_load((tmp_path / "queue.yaml").read_text())
    (tmp_path / "queue.yaml").write_text(yaml.safe_dump([content[0] | {"needs": ["lightly"]}]))
    (tmp_path / "lightly.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), "--minutes", "2", "--bundle", str(tmp_path / "no"), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )
    assert done.returncode == 1, done.stdout  # nothing is done
    (line,) = lines(tmp_path)
    assert line["status"] == "not run" and "needs lightly" in line["reason"]


def test_gaps_and_busy_time_are_those_of_overlapping_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from types import SimpleNamespace as Event

    import gpu_trace
    from torch.autograd import DeviceType

    def event(kind, name, start, end):
        spent = Event(start=start, end=end, elapsed_us=lambda: end - start)
        return Event(name=name, device_type=kind, time_range=spent, cpu_parent=None, is_user_annotation=False)

    kernels = [("conv", 0, 40), ("conv", 30, 50), ("add", 80, 100)]
    events = [event(DeviceType.CUDA, *each) for each in kernels]
    events += [event(DeviceType.CPU, "draw", 45, 70), event(DeviceType.CUDA, "Optimizer.step#SGD.step", 0, 100)]
    rows, found = gpu_trace.summary(events, 2, cuda=True)
    assert [(row["kernel"], row["us a step"], row["a step"]) for row in rows] == [
        ("conv", 30.0, 1.0),
        ("add", 10.0, 0.5),
    ]
    assert found["busy share"] == pytest.approx(0.7) and found["launches a step"] == 1.5
    assert found["longest gaps"] == [{"us": 30, "host did": "draw 20 us, no operation 10 us"}]
