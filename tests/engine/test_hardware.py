"""What the hardware is set to."""

import os

import pytest
import torch

from rotssl.engine import hardware
from tests.small_runs import make_config, trainer


@pytest.mark.contract
def test_deterministic_sets_what_cuda_wants(tmp_path, monkeypatch):
    for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if given:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        try:
            trainer(make_config(tmp_path, "simclr", **{"train.deterministic": True}))
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected and not torch.backends.cudnn.benchmark
        finally:
            torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    trainer(make_config(tmp_path, "simclr"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_memory_is_looked_at_as_seldom_as_takes_half_a_percent_of_the_time(monkeypatch):
    now, looked = [0.0], []

    def look():
        now[0] += 0.5
        looked.append(now[0])
        return len(looked)

    monkeypatch.setattr(hardware.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hardware.memory, "host_bytes", look)
    held, told = hardware.MemoryHeld(torch.device("cpu")), []
    for _ in range(30):
        told.append(held()["memory/host_bytes"])
        now[0] += 10.0  # an epoch
    assert looked == [0.5, 101.0, 201.5] and told == [1] * 10 + [2] * 10 + [3] * 10
