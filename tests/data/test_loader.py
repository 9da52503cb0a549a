"""Batches: the same with and without the thread that cuts them out, and a thread that ends with whoever takes them."""

import mmap
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotssl.base import memory
from rotssl.data.loader import AHEAD, Loader, prefetch
from rotssl.runs import journal
from tests.small_runs import make_config, trainer


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("input")]


def ended(within=5.0):
    deadline = time.monotonic() + within
    while threads() and time.monotonic() < deadline:
        time.sleep(0.001)
    return not threads()


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_prefetch_keeps_the_order_and_stays_within_its_distance(count, ahead):
    made, far = [], []

    def make(i):
        made.append(i)
        return i * i

    for i, value in enumerate(prefetch(make, count, ahead)):
        assert value == i * i
        far.append(len(made) - 1 - i)
    assert made == list(range(count)) and len(far) == count
    assert max(far, default=0) <= ahead
    assert ended()


def test_the_next_batch_is_made_while_the_one_before_is_in_use():
    made = threading.Event()
    batches = prefetch(lambda i: made.set() if i == 1 else None, 5, 1)
    next(batches)
    assert made.wait(5)


def test_an_error_comes_where_its_batch_would_have_come():
    def make(i):
        if i == 2:
            raise OSError("a bad disk")
        return i

    batches = prefetch(make, 5, 2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="a bad disk"):
        next(batches)
    assert ended()


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_no_thread_outlives_an_iterator_that_is_left_early(how):
    batches = prefetch(lambda i: np.zeros(10), 1000, AHEAD)
    next(batches)
    assert threads()
    if how == "close":
        batches.close()
    elif how == "raise":
        with pytest.raises(KeyError):
            batches.throw(KeyError())
    del batches
    assert ended()


def mapped(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def test_batches_are_the_same_with_and_without_the_thread(tmp_path):
    run = trainer(make_config(tmp_path, "byol", **{"data.limit": 64}))
    images = run.splits.train.images
    disk = Loader(run.config, mapped(images, tmp_path), run.runtime.device)
    assert (run.loader.ahead, disk.ahead) == (0, AHEAD)
    for epoch in (0, 3):
        for (a, ours), (b, theirs) in zip(run.loader.batches(epoch), disk.batches(epoch), strict=True):
            assert torch.equal(a, b) and b.dtype == torch.uint8
            assert np.array_equal(ours.positions, theirs.positions) and ours.step == theirs.step
            assert ours.progress == theirs.progress and ours.batch_start == theirs.batch_start
    assert ended()


def test_the_thread_draws_for_the_views_of_each_pass_what_the_step_would(tmp_path, monkeypatch):
    run = trainer(make_config(tmp_path, "byol", **{"data.limit": 64, "train.accumulate": 2}))
    loader = Loader(run.config, mapped(run.splits.train.images, tmp_path), run.runtime.device, augment=run.augment)
    draw, here = run.augment.draw, []  # the draws of this thread

    def watched(*given):
        here.extend([1] if threading.current_thread() is threading.main_thread() else [])
        return draw(*given)

    monkeypatch.setattr(run.augment, "draw", watched)
    for images, ctx in loader.batches(1):
        half = len(images) // 2
        for first in (0, half):
            part = replace(ctx, positions=ctx.positions[first : first + half])
            ahead = run.augment(images[first : first + half], part)
            assert not here
            now = run.augment(images[first : first + half], replace(part, draws=()))
            assert here.pop() and not here
            for ours, theirs in zip(ahead.full, now.full, strict=True):
                assert torch.equal(ours, theirs)
        run.augment(images[half:], replace(part, epoch=2))  # not what was drawn for
        assert here.pop()


@pytest.mark.contract
def test_a_run_on_disk_equals_one_in_memory_also_after_a_resume(tmp_path):
    def run(name, disk, *ends):
        for end in ends:
            fields = {"data.limit": 64, "tracking.run_name": name, "train.stop_after": end}
            one = trainer(make_config(tmp_path, "byol", **fields))
            if disk:
                one.loader.images, one.loader.ahead = mapped(one.splits.train.images, tmp_path), AHEAD
            one.run()
        return one

    whole, resumed = run("memory", False, 2), run("disk", True, 1, 2)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    points = journal.read(whole.config.run_dir), journal.read(resumed.config.run_dir)
    assert [point["loss/total"] for point in points[0].values()] == [p["loss/total"] for p in points[1].values()]
    assert ended()


@pytest.mark.contract
def test_the_log_has_the_wait_as_a_share_and_the_memory(tmp_path, monkeypatch):
    run = trainer(make_config(tmp_path, "byol", **{"data.limit": 64, "train.epochs": 1}))
    cut = run.loader._cut

    def slow(*batch):
        time.sleep(0.05)
        return cut(*batch)

    monkeypatch.setattr(run.loader, "_cut", slow)
    run.run()
    point = run.journal.point(1)
    waited = run.steps_per_epoch * 0.05
    assert waited <= point["throughput/input_wait"] * point["cost/train_seconds"] < 2 * waited
    assert 0 < point["throughput/input_wait"] < 1
    assert point["memory/host_bytes"] == pytest.approx(memory.host_bytes(), rel=0.2)
    assert "memory/device_peak_bytes" not in point


def test_host_bytes_counts_what_is_written_and_not_the_pages_of_a_file(tmp_path):
    size = 256 << 20
    before = memory.parts()
    mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the allocator may hold some already
    held = np.frombuffer(mapped, np.uint8)
    held[:] = 1
    assert memory.parts()["anon"] - before["anon"] == pytest.approx(size, rel=0.1)
    held.tofile(tmp_path / "file")
    del held
    mapped.close()
    held = np.memmap(tmp_path / "file", np.uint8, "r")
    assert held.sum() == size
    after = memory.parts()
    # A library counts for less while other processes map it too, and they come and go: tens of MB here.
    assert size / 2 < after["file"] - before["file"] < 2 * size
    assert abs(after["anon"] - before["anon"]) < size / 10
    assert abs(memory.host_bytes() - after["anon"] - after["shmem"]) < size / 10
    assert memory.host_bytes() < memory.host_memory()


FAULTS = """
import resource, sys, torch
from rotssl.base import memory
if sys.argv[1] == "keep":
    memory.tune_malloc()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 << 20)  # over the 32 MiB up to which glibc keeps blocks by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.exhaustive  # two processes that import torch, for what only costs time
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_freed_memory_is_kept():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 0.1 * faults("give back")


def test_an_allocator_that_refuses_a_high_threshold_gets_its_own_highest(monkeypatch):
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return int(name != memory._MMAP_THRESHOLD or value <= 32 << 20)  # as older versions of glibc

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    memory.tune_malloc()
    assert asked[-2:] == [(memory._MMAP_THRESHOLD, 32 << 20), (memory._TRIM_THRESHOLD, -1)]


@pytest.mark.parametrize("text", ["00-ff ---p 00000000 00:00 0 [rollup]\nRss: 12 kB\nPss: 8 kB\n", None])
def test_a_kernel_without_the_parts_of_pss_is_no_reason_to_fail(monkeypatch, text):
    def read(path):
        if text is None:
            raise PermissionError(path)
        return text

    monkeypatch.setattr(memory.Path, "read_text", read)
    assert memory.host_bytes() > 1 << 20
