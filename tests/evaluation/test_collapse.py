"""What shows that features collapse: their rank and spread."""

import math

import pytest
import torch

from rotssl.evaluation.collapse import effective_rank, feature_std
from tests.evaluation.features import features


def test_effective_rank_of_known_matrices():
    orthonormal = torch.linalg.qr(features(64, 16))[0]
    assert effective_rank(orthonormal) == pytest.approx(16, rel=1e-3)
    assert effective_rank(100 * orthonormal) == pytest.approx(16, rel=1e-3)
    assert effective_rank(orthonormal[:, :1] @ features(1, 16)) == pytest.approx(1, abs=0.01)
    assert effective_rank(orthonormal[:, :4] @ torch.linalg.qr(features(16, 4))[0].T) == pytest.approx(4, rel=1e-2)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_effective_rank_of_features_that_are_all_zero_is_a_number():
    assert math.isfinite(effective_rank(torch.zeros(10, 4)))


def test_feature_std_is_one_for_spread_and_zero_for_collapsed_features():
    spread = features(4000, 32)
    assert feature_std(spread).item() == pytest.approx(1, abs=0.02)
    assert feature_std(spread * torch.logspace(-3, 3, 4000)[:, None]).item() == pytest.approx(1, abs=0.02)
    assert feature_std(features(1, 32).expand(100, -1)).item() == pytest.approx(0, abs=1e-6)
    # Two of 32 directions, with one sign each: the deviation of +-1 in one dimension, none in the others.
    line = torch.zeros(1000, 32)
    line[::2, 0], line[1::2, 0] = 1, -1
    assert feature_std(line).item() == pytest.approx(math.sqrt(32) / 32, rel=1e-3)
    assert feature_std(spread.half()).dtype == torch.float32
