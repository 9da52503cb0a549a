"""Golden losses of every method: nothing changes what training computes without its being said (tests/golden.py)."""

import json

import pytest
import torch

from rotssl.config.methods import METHODS
from tests.golden import FILE, FORMS, STEPS, losses

pytestmark = pytest.mark.contract
GOLDEN = json.loads(FILE.read_text())["losses"]
# Rounding: 2e-12 at most between AVX2 and AVX-512. Without either, single precision in the augmentation rounds otherwise, and
# training amplifies that to per cents within 20 steps; the first step is still the same to 1e-7.
VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_those_on_record(tmp_path, method, form):
    assert method in GOLDEN, f"none on record yet: python -m tests.golden --renew {method}"
    found, golden = losses(tmp_path, method, form), GOLDEN[method][form]
    assert found.keys() == golden.keys()
    steps, tolerance = (STEPS, 1e-9) if VECTORS else (1, 1e-6)
    for key, values in golden.items():
        assert len(values) == len(found[key]) == STEPS
        assert found[key][:steps] == pytest.approx(values[:steps], rel=tolerance), key
