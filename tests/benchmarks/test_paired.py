"""Contenders of a benchmark don't run in one another's time."""

import itertools
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.contract
def test_contenders_rest_while_another_one_works(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    from paired import started, take_turns

    # Each one writes down when it is at work, in a thread that goes on between its turns unless it is stopped.
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1]); from paired import serve\n"
        "log = open(sys.argv[2], 'w', buffering=1)\n"
        "def tick():\n"
        "    while True: log.write(f'{time.time()}\\n'); time.sleep(0.005)\n"
        "threading.Thread(target=tick, daemon=True).start()\n"
        "def work(n): time.sleep(0.05 * n); return 0.01 * n\n"
        "serve(lambda: (work, {'who': sys.argv[2]}), 1)\n"
    )
    names = ("a", "b")
    commands = {name: [sys.executable, "-c", code, str(FOLDER), str(tmp_path / f"{name}.txt")] for name in names}
    with started(commands, 1, tmp_path) as contenders:
        before = time.time()
        samples = take_turns(contenders, dict.fromkeys(names, 4), 3)
        after = time.time()
    ticks = {name: [float(line) for line in (tmp_path / f"{name}.txt").read_text().split()] for name in names}
    merged = sorted((at, name) for name in names for at in ticks[name] if before < at < after)
    runs = [(name, len(list(run))) for name, run in itertools.groupby(name for _, name in merged)]
    # A signal takes a moment to arrive, in which one more line may be written.
    order = [name for name, _ in itertools.groupby(name for name, length in runs if length > 2)]
    assert order == ["a", "b", "a", "b"]  # a b, b a, a b
    for own in samples.values():
        assert all(0.2 <= each.seconds < 5 and each.waited == 0.04 for each in own)
