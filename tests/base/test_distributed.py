"""What workers tell each other."""

import numpy as np
import pytest
import torch

from rotssl.base import distributed
from tests.small_runs import make_config, trainer


@pytest.mark.contract
def test_features_of_all_workers_come_to_the_first(pool):
    first, second = pool.run(gathered)
    np.testing.assert_array_equal(first, [[0, 0], [0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(second, [[1, 1], [1, 1]])


def gathered():
    rows = torch.full((2, 2), float(distributed.rank()))
    return distributed.gather_to(rows, 0).numpy()


def statistics(overrides):
    """Running statistics of this worker before and after they follow the first one's."""
    run = trainer(make_config(**overrides))
    for images, ctx in run.batches(0):
        run.step(images, ctx)
    mean = run.model.encoder.stem[1].running_mean
    before = mean.tolist()
    distributed.broadcast_running_stats(run.model)
    return before, mean.tolist()


def test_running_statistics_of_each_worker_follow_the_first_one_s(tmp_path, pool):
    given = {"folder": tmp_path, "method": "byol", "model.norm": "batch", "data.limit": 64}
    (first, first_after), (second, second_after) = pool.run(statistics, given)
    assert first != second
    assert first == first_after == second_after
