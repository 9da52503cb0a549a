"""What a protocol may see: labels of its part alone, rates chosen on images that were not trained on, and no false numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from rotssl import config as cfg
from rotssl.config import evaluating
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.evaluation import bench as module
from rotssl.evaluation import subsets
from rotssl.evaluation.bench import Bench
from rotssl.evaluation.plan import plan

CLASSES, EACH, SIDE = 4, 25, 8


@pytest.fixture
def made():
    """A bench on images of four classes, of four shades."""
    config = cfg.resolve(
        cfg.build({"data.image_size": SIDE, "data.name": "synthetic", "train.batch_size": 20}), SIDE, 100
    )
    random = np.random.default_rng(0)

    def images(count):
        labels = np.arange(CLASSES * count) % CLASSES
        pixels = 60 * labels[:, None, None, None] + random.integers(0, 20, (len(labels), 3, SIDE, SIDE))
        return ImageSet(pixels.astype(np.uint8), labels)

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 6))
    augment = Augment(config.views, SIDE, (0.5,), (0.2,), 0)
    return Bench(config, encoder.eval(), images(EACH), images(5), augment, torch.device("cpu"))


def measured(bench, protocol, **options):
    numbers = plan([protocol], evaluating.build(options), bench.config.evaluation, "student")
    return bench.measure(numbers)


def test_semi_supervised_classifiers_see_the_labels_of_their_part_alone(made, monkeypatch):
    seen = []

    def spy(bank, labels, *more):
        seen.append(labels)
        return torch.ones(20, dtype=torch.bool)

    monkeypatch.setattr(module, "linear_hits", spy)
    measured(made, "semi", **{"semi.shares": "0.1,0.5"})
    parts = [subsets.subset(made.train.labels, share, 0) for share in (0.1, 0.5)]
    assert [labels.tolist() for labels in seen] == [made.train.labels[part].tolist() for part in parts]


@pytest.mark.parametrize("protocol", ["finetune", "sgd"])
def test_rates_are_chosen_on_images_apart_and_the_last_training_takes_the_part_alone(made, monkeypatch, protocol):
    trained, judged = [], []
    views, rate = module.sgd.view_batches, Bench._rate

    def view_batches(config, data, *more):
        trained.append({image.tobytes() for image in data.images})
        return views(config, data, *more)

    def spied(self, number, rates, index, train, logits):
        def seen(network, rows):
            judged.append({image.tobytes() for image in self.train.images[rows]})
            return logits(network, rows)

        return rate(self, number, rates, index, train, seen)

    monkeypatch.setattr(module.sgd, "view_batches", view_batches)
    monkeypatch.setattr(Bench, "_rate", spied)
    short = {f"{protocol}.epochs": 1, f"{protocol}.lr": "0.01,0.1"}
    own = {"finetune.shares": "0.2", "finetune.seeds": 1} if protocol == "finetune" else {"sgd.preset": "swav"}
    (result,) = measured(made, protocol, **short, **own)
    part = subsets.subset(made.train.labels, 0.2, 0) if protocol == "finetune" else np.arange(CLASSES * EACH)
    whole = {image.tobytes() for image in made.train.images[part]}
    assert len(trained) == 3 and trained[-1] == whole and len(judged) == 2
    for ours, apart in zip(trained[:2], judged, strict=True):
        assert ours.isdisjoint(apart) and ours | apart == whole and len(apart) == len(whole) // 5
    assert result.facts["batch_size"] <= len(whole)


@pytest.mark.parametrize("protocol", ["linear", "semi", "sgd", "finetune", "fewshot"])
def test_features_that_are_not_finite_have_no_accuracy(made, protocol):
    with torch.no_grad():
        made.encoder[1].bias.fill_(float("nan"))
    more = {"finetune.epochs": 1, "finetune.shares": "0.2", "finetune.lr": "0.1", "sgd.epochs": 1, "fewshot.ways": 3}
    for result in measured(made, protocol, **more):
        assert np.isnan(result.metrics[result.number.key]) and not result.hits


def test_what_a_card_says_is_fp32_is_not_rounded_to_tf32(made):
    seen, before = [], torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # the default, which only a GPU follows
    try:
        made.encoder.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
        measured(made, "finetune", **{"finetune.epochs": 1, "finetune.shares": "0.2", "finetune.seeds": 1})
        assert len(seen) > 3 and not any(seen) and torch.backends.cudnn.allow_tf32
        del seen[:]
        made.encode(made.test)
        assert seen == [False] and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_run_with_an_oracle_is_measured_as_others_are(made):
    made.config = dataclasses.replace(made.config, oracle=dataclasses.replace(made.config.oracle, log=True))
    short = {"finetune.epochs": 1, "finetune.shares": "0.2", "finetune.seeds": 1, "finetune.lr": "0.1"}
    (result,) = measured(made, "finetune", **short)
    assert 0 <= result.metrics[result.number.key] <= 1
