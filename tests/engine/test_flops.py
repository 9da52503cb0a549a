"""What is counted as a run's FLOPs."""

import pytest

from tests.small_runs import PAPER, make_config, trainer


@pytest.mark.contract
def test_the_flops_of_a_run_follow_the_share_of_rotated_images(tmp_path):
    def flops(**fields):
        given = {"data.limit": 32, "train.epochs": 2, "evaluation.knn_every": 0, **PAPER, **fields}
        run = trainer(make_config(tmp_path / str(len(list(tmp_path.iterdir()))), "byol", **given))
        run.run()
        return [run.journal.point(epoch)["cost/flops"] for epoch in (1, 2)]

    whole, quarter = flops(), flops(**{"rotation.fraction": 0.25})
    falling = flops(**{"rotation.fraction_end": 0.25})
    assert whole[0] > falling[0] > falling[1] - falling[0] > quarter[0]
    # Along a cosine the mean over a run is that of its ends.
    assert falling[1] == pytest.approx((whole[1] + quarter[1]) / 2)
