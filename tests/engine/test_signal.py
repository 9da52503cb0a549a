"""Signal and noise of gradients: against numbers written out, against draws whose answer is known, and on a run."""

import math
from itertools import islice

import pytest
import torch

from rotssl.engine.signal import Spread, measured
from rotssl.runs import checkpoint
from tests.small_runs import arithmetic, make_config, trainer

pytestmark = pytest.mark.contract


def spread_of(*series, names=("ssl", "rotation")):
    found = Spread()
    for vectors in zip(*series, strict=True):
        found.add(dict(zip(names, map(torch.tensor, vectors), strict=True)))
    return found.signal()


def test_hand_made_gradients_have_the_known_answer():
    # Mean (2, 0) with deviations (1, 0), (-1, 0): the trace of the covariance is 2, the square of the mean 4 - 2 / 2.
    # Mean (0, 3) with deviations (0, 0): no noise at all. The third is the first, doubled.
    first, second = [(3.0, 0.0), (1.0, 0.0)], [(0.0, 3.0), (0.0, 3.0)]
    doubled = [(6.0, 0.0), (2.0, 0.0)]
    found = spread_of(first, second, doubled, names=("ssl", "rotation", "jigsaw"))
    assert found.batches == 2
    assert found.snr == {"ssl": pytest.approx(3 / 2), "rotation": None, "jigsaw": pytest.approx(3 / 2)}
    assert found.norm == {"ssl": pytest.approx(2), "rotation": pytest.approx(3), "jigsaw": pytest.approx(4)}
    assert found.cosine["ssl and rotation"] == pytest.approx(0)
    assert found.cosine["ssl and jigsaw"] == pytest.approx(1)
    assert found.batch_cosine["ssl and jigsaw"] == pytest.approx(1)


def test_it_is_the_formula_in_one_pass_and_in_two():
    generator = torch.Generator().manual_seed(3)
    one, two = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) + 0.7
    found = spread_of(one.tolist(), two.tolist())
    mean, noise = one.mean(0), (one - one.mean(0)).square().sum() / 6
    square = mean.square().sum() - noise / 7
    assert found.snr["ssl"] == pytest.approx(float(square / noise))
    common = ((one - one.mean(0)) * (two - two.mean(0))).sum() / 6
    other = two.mean(0).square().sum() - (two - two.mean(0)).square().sum() / 6 / 7
    cosine = (one.mean(0) @ two.mean(0) - common / 7) / (square * other).sqrt()
    assert found.cosine["ssl and rotation"] == pytest.approx(float(cosine))


def test_pure_noise_has_no_signal_on_the_average_and_known_signal_is_found():
    generator = torch.Generator().manual_seed(0)
    snr, cosines = {0.0: [], 1.0: []}, []
    for _ in range(100):
        for signal, found in snr.items():
            noise = torch.randn(4, 50, generator=generator, dtype=torch.float64)
            both = noise + signal, torch.randn(4, 50, generator=generator, dtype=torch.float64) + signal
            result = spread_of(*(series.tolist() for series in both))
            found.append(result.snr["ssl"])
            cosines += [result.cosine["ssl and rotation"]] if signal else []
    # |E g|^2 = 50 signal^2, and the trace of the covariance is 50.
    assert sum(snr[0.0]) / 100 == pytest.approx(0, abs=0.02)
    assert sum(snr[1.0]) / 100 == pytest.approx(1, abs=0.06)
    assert sum(cosines) / 100 == pytest.approx(1, abs=0.06)  # the same direction, whatever the noise
    assert any(value < 0 for value in snr[0.0])


def test_what_has_no_gradient_has_no_ratio_and_one_batch_no_spread():
    found = spread_of([(1.0, 2.0), (1.0, 3.0)], [(0.0, 0.0), (0.0, 0.0)])
    assert found.snr["rotation"] is None and found.cosine["ssl and rotation"] is None
    assert found.batch_cosine["ssl and rotation"] is None
    with pytest.raises(ValueError, match="1 batches have no spread"):
        spread_of([(1.0, 2.0)], [(1.0, 2.0)])


@pytest.mark.parametrize("method", ["byol", pytest.param("mocov2", marks=pytest.mark.exhaustive)])
def test_measuring_a_run_leaves_its_state_and_draws_alone(tmp_path, method):
    fields = {
        "data.limit": 64,
        "rotation.share": 0.3,
        "rotation.every": 2,
        "train.epochs": 2,
        "evaluation.knn_every": 0,
    }
    with arithmetic(torch.float64):
        run = trainer(make_config(tmp_path, method, **fields))
        plain = trainer(make_config(tmp_path / "plain", method, **fields))
        for made in (run, plain):
            made.model.balance.accuracy.fill_(0.4)  # an open gate
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        found = [measured(run, 6, epoch) for epoch in (0, 2)]
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert found[0].snr.keys() == {"ssl", "rotation"} and found[0].batches == 6
        for (images, ctx), (same, _) in islice(zip(run.batches(0), plain.batches(0), strict=True), 3):
            ours, theirs = run.step(images, ctx), plain.step(same, ctx)
            assert ours["loss/ssl"] == theirs["loss/ssl"]
            assert torch.equal(run.model.balance.accuracy, plain.model.balance.accuracy)
    assert all(math.isfinite(value) for value in found[0].norm.values())


def test_the_checkpoints_of_every_nth_epoch_are_kept(tmp_path):
    fields = {"data.limit": 16, "train.epochs": 5, "train.keep_every": 2, "evaluation.knn_every": 0}
    config = make_config(tmp_path, "byol", **fields, **{"evaluation.linear": False})
    trainer(config).run()
    assert [path.name for path in checkpoint.found(config.run_dir)] == [checkpoint.name(e) for e in (5, 4, 2)]
    checkpoint.prune(config.run_dir)
    assert len(checkpoint.found(config.run_dir)) == 3


def test_losses_that_come_and_go_are_not_mixed():
    spread = Spread()
    spread.add({"ssl": torch.ones(2), "rotation": torch.ones(2)})
    with pytest.raises(ValueError, match="gradients of ssl after those of ssl, rotation"):
        spread.add({"ssl": torch.ones(2)})
    assert spread.count == 1
