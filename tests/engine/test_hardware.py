"""What the hardware is set to."""

import os

import pytest
import torch

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
