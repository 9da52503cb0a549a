"""Where a run takes place."""

import pytest
import torch

from rotssl.engine.runtime import LocalRuntime


@pytest.mark.contract
def test_a_device_always_has_an_index(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with pytest.raises(ValueError, match="index"):  # which the thread that reads ahead would die of
        torch.cuda.set_device(torch.device("cuda"))
    torch.cuda.set_device(LocalRuntime(tmp_path, torch.device("cuda")).device)
    torch.cuda.set_device(LocalRuntime(tmp_path, torch.device("cuda", 1)).device)
    assert chosen == [3, 1] and LocalRuntime(tmp_path, torch.device("cpu")).device == torch.device("cpu")
