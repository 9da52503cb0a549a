"""The loop of SGD: what it trains and what it leaves alone, the images' labels, rates and their choice."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from rotssl.config.evaluating import FinetuneOptions, SgdOptions, build
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet
from rotssl.evaluation import sgd
from rotssl.evaluation.sgd import Classifier, Recipe
from tests.data.views import pictures
from tests.evaluation.features import features
from tests.small_runs import CPU, make_config

RECIPE = Recipe(3, 16, 0.5, 0.05, scale=(0.5, 1.0))


class Network(nn.Module):
    """A convolution and a norm, (B, 3, S, S) -> (B, 4)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def levels(count=64, classes=4):
    """Images of one gray each, which is the label."""
    labels = np.arange(count) % classes
    return ImageSet(np.tile((60 * labels)[:, None, None, None], (1, 3, 12, 12)).astype(np.uint8), labels)


def batches(tmp_path, data, recipe, seed=0, **fields):
    config = make_config(tmp_path, "simclr", **fields)
    return sgd.view_batches(config, data, Augment(config.views, 8, (0.0,), (1.0,), 0), recipe, seed, CPU)


def fitted(tmp_path, frozen, seed=0):
    torch.manual_seed(0)
    encoder = Network()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    made = sgd.fit(Classifier(encoder, 4, 4, seed, frozen), batches(tmp_path, levels(), RECIPE, seed), RECIPE)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # a copy was trained
    return before, made


def test_a_view_has_the_label_of_its_image(tmp_path):
    made, seen = batches(tmp_path, levels(), RECIPE), []
    for epoch in range(2):
        for views, labels in made(epoch):
            assert views.shape == (16, 3, 8, 8)
            assert torch.allclose(views.mean((1, 2, 3)) * 255, 60.0 * labels, atol=0.01)
            seen += labels.tolist()
    assert len(seen) == 128 and seen[:64] != seen[64:]
    again = [label for _, labels in batches(tmp_path, levels(), RECIPE)(0) for label in labels.tolist()]
    assert again == seen[:64]
    assert len(list(batches(tmp_path, levels(40), RECIPE)(0))) == 2  # the last part of a batch is dropped
    assert len(list(batches(tmp_path, levels(10), RECIPE)(0))) == 1  # a small set is one batch


def test_crops_are_chosen_by_saliency_in_pretraining_alone(tmp_path):
    data = ImageSet(pictures(32).numpy(), np.arange(32) % 4)
    plain, chosen = (batches(tmp_path, data, RECIPE, **{"views.good_crops": share})(0) for share in (0, 1))
    assert all(torch.equal(one, two) for (one, _), (two, _) in zip(plain, chosen, strict=True))


def test_a_view_is_a_crop_that_is_sometimes_flipped(tmp_path):
    ramp = np.tile(np.arange(12, dtype=np.uint8) * 20, (64, 3, 12, 1))
    whole = dataclasses.replace(RECIPE, scale=(1.0, 1.0), batch_size=64)
    ((views, _),) = batches(tmp_path, ImageSet(ramp, np.zeros(64, np.int64)), whole)(0)
    slopes = views[:, 0, 0, -1] - views[:, 0, 0, 0]
    assert 20 <= int((slopes > 0).sum()) <= 44 and (slopes.abs() > 0.3).all()
    assert torch.equal(views[:, 0], views[:, 1])  # colours stay


def test_a_frozen_encoder_stays_as_it_is_and_one_that_is_tuned_does_not(tmp_path):
    before, made = fitted(tmp_path, frozen=True)
    assert all(torch.equal(value, before[name]) for name, value in made.encoder.state_dict().items())
    assert float(made.head.weight.detach().std()) > 0.05 and not made.training
    before, made = fitted(tmp_path, frozen=False)
    changed = [name for name, value in made.encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert {"conv.weight", "norm.weight", "norm.running_mean"} <= set(changed)
    assert not made.training and not made.encoder.training


def test_a_seed_makes_one_classifier(tmp_path):
    first, again, other = (fitted(tmp_path, False, seed)[1].head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_features_that_are_apart_are_learned_and_rates_fall_along_a_cosine(monkeypatch):
    labels = torch.arange(200) % 5
    rows, rates = features(200, 16) + 4 * features(5, 16, seed=9)[labels], []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self)
    )
    recipe = Recipe(10, 50, 0.2)
    made = sgd.fit(Classifier(None, 16, 5, 0, True), sgd.feature_batches(rows, labels, recipe, 0), recipe)
    assert float((made(rows).argmax(1) == labels).float().mean()) > 0.98
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * (i // 4) / 10)) for i in range(40)])


def test_the_best_rate_has_the_lowest_loss():
    losses = {0.1: 2.0, 0.3: 1.0, 1.0: math.nan, 3.0: math.inf}
    assert sgd.best_rate(losses) == 0.3
    assert sgd.best_rate({1.0: math.nan, 0.1: 2.0}) == 0.1


def test_presets_are_the_published_ones():
    recipes = {name: sgd.linear_recipe(SgdOptions(preset=name))[0] for name in ("paper", "paper-crop", "swav")}
    assert all(recipe.epochs == 100 and recipe.encoder_lr == 0 for recipe in recipes.values())
    rows = {name: (r.lr, r.batch_size, r.weight_decay, r.scale) for name, r in recipes.items()}
    assert rows["paper"] == (1.0, 512, 0, None) and rows["paper-crop"][:2] == (30.0, 512)
    assert rows["swav"] == (0.3, 256, 1e-6, (0.08, 1.0))
    recipe, rates = sgd.linear_recipe(build({"sgd.preset": "swav", "sgd.lr": "0.1,1", "sgd.epochs": "5"}).sgd)
    assert (recipe.epochs, rates) == (5, (0.1, 1.0))


@pytest.mark.parametrize(
    ("share", "images", "epochs", "size"),
    [(0.01, 50, 60, 16), (0.1, 500, 30, 62), (1.0, 5000, 20, 256), (0.01, 4, 60, 4)],
)
def test_the_length_of_finetuning_follows_from_the_share(share, images, epochs, size):
    recipe = sgd.finetune_recipe(FinetuneOptions(), share, images)
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.encoder_lr) == (epochs, size, 0.2, 0.01)
