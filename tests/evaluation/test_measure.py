"""What a measurement is given."""

import torch

from tests.small_runs import make_config, trainer


def test_the_bf16_option_reaches_knn(tmp_path, monkeypatch):
    kinds = []
    monkeypatch.setattr("rotssl.evaluation.measure.knn_top1", lambda *given: kinds.append(given[-1]) or 0.5)
    for bf16 in (False, True):
        config = make_config(tmp_path / str(bf16), "simclr", **{"data.limit": 64, "evaluation.knn_bf16": bf16})
        trainer(config).evaluate(0)
    assert kinds == [torch.float32, torch.bfloat16]
