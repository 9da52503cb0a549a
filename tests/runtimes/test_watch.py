"""The watch over workers: when it acts, and what it does then; and that long phases without a step are heard of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rotssl.base import heartbeat
from rotssl.config.views import ViewsConfig
from rotssl.data import decoding
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.engine.events import StepDone, Usage
from rotssl.evaluation.knn import knn_hits
from rotssl.evaluation.linear import linear_hits
from rotssl.evaluation.measure import encode_share
from rotssl.runtimes import watch
from rotssl.runtimes.watch import Alive, Joined, Watch


@pytest.fixture
def clock(monkeypatch):
    """The watch's clock in minutes, as a list of one."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0] * 60)
    return now


class Seen(Watch):
    def __init__(self, ready=True, unkillable=()):
        self.killed, self.told = [], []
        super().__init__(30, self._kill, lambda: ready, self.told.append)
        self.unkillable = unkillable

    def _kill(self, actor):
        self.killed.append(actor)
        if actor in self.unkillable:
            raise RuntimeError("unreachable")


def join(guard, *names):
    for rank, name in enumerate(names):
        assert guard.see(Joined(rank, name, "controller"))


def test_workers_that_make_no_progress_are_ended_once(clock):
    guard = Seen()
    guard.check()
    clock[0] = 100
    guard.check()  # no worker yet: it waits for resources
    join(guard, "a", "b")
    for clock[0] in (129, 158):
        guard.check()
        assert not guard.see(StepDone(1, 1, 9)), "a step is for others too"
    assert guard.see(Alive())
    clock[0] = 187
    assert not guard.see(Usage({})), "which comes from a worker that hangs, too"
    guard.check()
    assert guard.killed == [] and guard.told == [] and guard.to_blame == ""
    clock[0] = 188
    guard.check()
    assert guard.killed == ["a", "b"] and len(guard.told) == 1 and "scaling.hang_minutes" in guard.told[0]
    clock[0] = 217
    guard.check()
    join(guard, "c", "d")
    assert guard.killed == ["a", "b"] and guard.to_blame == ""
    clock[0] = 247
    guard.check()
    assert guard.killed == ["a", "b", "c", "d"] and "2 times" in guard.to_blame


@pytest.mark.parametrize("case", ["no new workers", "images", "unkillable"])
def test_a_run_that_cannot_be_restarted_is_ended(clock, case):
    guard = Seen(ready=case != "images", unkillable=["a"] if case == "unkillable" else ())
    join(guard, "a", "b")
    clock[0] = 30
    guard.check()
    if case == "no new workers":
        assert guard.killed == ["a", "b"]
        clock[0] = 60
        guard.check()
    assert guard.killed == (["controller"] if case == "images" else ["a", "b", "controller"])
    assert ("images" if case == "images" else "no new workers") in guard.to_blame
    clock[0] = 1000
    guard.check()
    assert guard.killed.count("controller") == 1


def test_a_beat_is_told_at_most_once_per_interval(monkeypatch):
    now, heard = [0.0], []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    heartbeat.beat()
    with heartbeat.listener(lambda: heard.append(now[0]), 5):
        for now[0] in (1.0, 2.0, 5.9, 6.0, 6.1, 20.0):
            heartbeat.beat()
    heartbeat.beat()
    assert heard == [1.0, 6.0, 20.0]


def test_evaluation_and_decoding_are_heard_of(tmp_path):
    images, labels = torch.rand(64, 8), torch.arange(64) % 2
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")

    def encode():
        pixels = np.zeros((4, 3, 16, 16), np.uint8)
        augment = Augment(ViewsConfig(), 16, (0.5,), (0.5,), 0)
        encoder = torch.nn.Flatten()
        encode_share(encoder, ImageSet(pixels, None), augment, torch.device("cpu"), torch.contiguous_format, batch=1)

    phases = {
        "encoding": encode,
        "kNN": lambda: knn_hits(images, labels, images, labels),
        "probe": lambda: linear_hits(images, labels, images, labels),
        "decoding": lambda: decoding.decode([str(tmp_path / "0.png")], (8, 8), 8, lambda _: lambda *_: None),
    }
    for name, phase in phases.items():
        heard = []
        driver = SimpleNamespace(actor=SimpleNamespace(put_nowait=SimpleNamespace(remote=heard.append)))
        with watch.signs_of_life(driver, 1e-9):
            phase()
        assert heard and (name != "encoding" or heard == [Alive()] * 4), name
