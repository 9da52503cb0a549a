"""What a measurement is given, and what it keeps."""

import math

import pytest
import torch

from rotssl.evaluation.measure import Features, measures
from tests.small_runs import make_config, trainer


def test_the_bf16_option_reaches_knn(tmp_path, monkeypatch):
    kinds = []
    right = torch.ones(2, dtype=torch.bool)
    monkeypatch.setattr("rotssl.evaluation.measure.knn_hits", lambda *given: kinds.append(given[4]) or right)
    for bf16 in (False, True):
        config = make_config(tmp_path / str(bf16), "simclr", **{"data.limit": 64, "evaluation.knn_bf16": bf16})
        trainer(config).evaluate(0)
    assert kinds == [torch.float32, torch.bfloat16]


def test_hits_are_those_of_which_top1_is_the_mean():
    gen = torch.Generator().manual_seed(0)
    labels, asked = torch.arange(300) % 3, torch.arange(90) % 3
    bank, queries = (part[:, None] + torch.randn(len(part), 4, generator=gen) for part in (labels, asked))
    hits, parts = {}, (Features(bank, labels), Features(queries, asked))
    found = {name: measure.compute() for name, measure in measures(*parts, True, hits=hits).items()}
    assert found == {name: measure.compute() for name, measure in measures(*parts, True).items()}
    for name in ("knn", "linear"):
        assert hits[name].shape == (90,) and hits[name].dtype == torch.bool
        assert 0.4 < found[f"{name}/top1"] < 0.95
        assert found[f"{name}/top1"] == pytest.approx(float(hits[name].double().mean()))
    hits.clear()
    queries[0] = math.nan
    assert math.isnan(measures(*parts, True, hits=hits)["linear/top1"].compute()) and not hits
