"""What a protocol may see: labels of its part alone, rates chosen on images that were not trained on, and no false numbers."""

import dataclasses
import functools
import itertools
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rotssl import config as cfg
from rotssl.config import evaluating
from rotssl.config.fields import ConfigError
from rotssl.data import datasets
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, shades
from rotssl.evaluation import bench as module
from rotssl.evaluation import cards, crew, subsets
from rotssl.evaluation import subject as subjects
from rotssl.evaluation.bench import Bench
from rotssl.evaluation.plan import plan
from rotssl.evaluation.setting import Setting
from rotssl.export.encoder import Encoder

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

    def spy(bank, labels):
        seen.append(labels)

    monkeypatch.setattr(module, "fit_probe", spy)
    measured(made, "semi", **{"semi.shares": "0.1,0.5"})
    parts = [subsets.subset(made.train.labels, share, 0) for share in (0.1, 0.5)]
    assert [labels.tolist() for labels in seen] == [made.train.labels[part].tolist() for part in parts]


@pytest.mark.parametrize("protocol", ["finetune", "sgd"])
def test_rates_are_chosen_on_images_apart_and_the_last_training_takes_the_part_alone(made, monkeypatch, protocol):
    trained, judged = [], []
    views, loss = module.sgd.view_batches, Bench._loss

    def view_batches(config, data, *more):
        trained.append({image.tobytes() for image in data.images})
        return views(config, data, *more)

    def spied(self, logits, rows):
        judged.append({image.tobytes() for image in self.train.images[rows]})
        return loss(self, logits, rows)

    monkeypatch.setattr(module.sgd, "view_batches", view_batches)
    monkeypatch.setattr(Bench, "_loss", spied)
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
        made.precise = lambda: not torch.backends.cudnn.allow_tf32  # type: ignore[attr-defined]
        assert made.work(crew.Task("precise", ()))  # as a worker does one
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_run_with_an_oracle_is_measured_as_others_are(made):
    made.config = dataclasses.replace(made.config, oracle=dataclasses.replace(made.config.oracle, log=True))
    short = {"finetune.epochs": 1, "finetune.shares": "0.2", "finetune.seeds": 1, "finetune.lr": "0.1"}
    (result,) = measured(made, "finetune", **short)
    assert 0 <= result.metrics[result.number.key] <= 1


def test_cards_say_the_penalty_and_how_many_queries_a_class_had(made):
    for protocol in ("linear", "semi"):
        facts = measured(made, protocol)[0].facts
        assert (
            facts["penalty"]
            in facts["penalties_tried"]
            == [1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5][: len(facts["penalties_tried"])]
        )
    (found,) = measured(made, "fewshot", **{"fewshot.ways": 3, "fewshot.shots": 1, "fewshot.episodes": 5})
    card = cards.card({}, [found])
    assert (card["queries"], card["queries_asked"]) == (5, 15)  # there are 5 test images of each class
    own = {"numbers": {"a": {"penalties_tried": [1.0, 0.1], "value": 0}, "b": {"penalties_tried": [1.0], "value": 1}}}
    assert cards.params(own) == {"card.penalties_tried": "1.0 0.1, 1.0"}
    (found,) = measured(made, "fewshot", **{"fewshot.ways": 3, "fewshot.shots": 1, "fewshot.queries": 4})
    assert found.facts == {}


def test_the_run_s_own_images_are_no_transfer_whatever_they_are_called(tmp_path):
    for split, seeds in (("train", range(20)), ("test", range(20, 30))):
        for seed in seeds:
            file = tmp_path / "own" / split / "ab"[seed % 2] / f"{seed}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    own = {"data.name": "imagefolder", "data.root": str(tmp_path / "own"), "train.batch_size": 4}
    config = cfg.resolve(cfg.build({**own, "data.limit": 10}), 16, 10)
    datasets.load(config.data, 0.1).record.save(tmp_path / "run")
    shutil.copytree(tmp_path / "own", tmp_path / "copied")
    data = dataclasses.replace(config.data, root=str(tmp_path / "copied"), limit=None)
    with pytest.raises(ConfigError, match=r"copied has the run's own images; leave --data\.name and --data\.root out"):
        Setting(config, str(tmp_path / "run"), "student", 1, data).images()
    whole = datasets.load(data, 0.1).record
    (tmp_path / "copied" / "train" / "a" / "0.png").unlink()
    for name in ("2", "4", "6"):
        shutil.copy(tmp_path / "own" / "test" / "a" / "20.png", tmp_path / "copied" / "train" / "a" / f"{name}.png")
    assert len(Setting(config, str(tmp_path / "run"), "student", 1, data).images()[0]) == 17
    fewer = datasets.load(data, 0.1).record
    assert whole.same(whole, part=False) and not whole.same(fewer, part=False)  # a set with more images is another one


def test_a_run_in_shades_of_grey_sees_colours_as_its_export_does(tmp_path):
    config = cfg.resolve(cfg.build({"data.name": "fashion-mnist-sample"}), 28, 1000)
    other = cfg.resolve(cfg.build({"data.name": "synthetic", "data.image_size": 28}), 28, 1000).data
    (train, test), colours = Setting(config, str(tmp_path), "student", 1, other).images(), datasets.load_test(other)
    assert train.images.shape[1] == test.images.shape[1] == 1 and colours.images.shape[1] == 3
    encoder = Encoder(nn.Identity(), 1, {"mean": [0.286], "std": [0.353], "image_size": 28, "stored": [32, 32]})
    augment = Augment(config.views, 28, *datasets.normalization(config.data.name), 0)
    seen = augment.evaluation(torch.from_numpy(test.images[:4]))
    for pixels, ours in zip(colours.images[:4], seen, strict=True):
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        assert torch.equal(encoder.transform(picture), ours)
        assert (np.asarray(picture.convert("L")) == shades(pixels)[0]).all()  # as Pillow computes them


class Two:
    """A crew of two subjects, to which everything travels as it would to other processes."""

    count = 2

    def __init__(self, bench):
        parts = bench.config, bench.encoder, bench.train, bench.test, bench.augment, bench.device
        self.subjects = [subjects.Subject(*copied(parts)) for _ in range(2)]
        self.tasks = []

    def share(self, value):
        return copied(value)

    def run(self, tasks):
        self.tasks += [task.name for task in tasks]
        done = {i: self.subjects[i % 2].work(copied(tasks[i])) for i in reversed(range(len(tasks)))}
        return [copied(done[i]) for i in range(len(tasks))]


def copied(value):
    return pickle.loads(pickle.dumps(value))


def test_what_a_crew_measures_is_what_one_process_measures(made, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(subjects, "encode_share", functools.partial(subjects.encode_share, batch=8))
    short = {
        **{"sgd.epochs": 2, "sgd.lr": "0.1,1", "sgd.preset": "swav", "finetune.epochs": 1, "finetune.seeds": 2},
        **{"finetune.shares": "0.2,0.4", "finetune.lr": "0.01,0.1", "fewshot.ways": 3, "fewshot.episodes": 5},
        **{"robustness.severities": "5", "robustness.corruptions": "gaussian_noise", "robustness.angles": "90"},
    }
    numbers = plan(evaluating.PROTOCOLS, evaluating.build(short), made.config.evaluation, "student")
    numbers += plan(["sgd"], evaluating.build({"sgd.epochs": 2, "sgd.lr": "0.1,1"}), made.config.evaluation, "student")
    crew = Two(made)
    two = Bench(made.config, made.encoder, made.train, made.test, made.augment, made.device, crew=crew)
    for _, group in itertools.groupby(numbers, lambda number: number.protocol):
        group = list(group)
        for ours, theirs in zip(made.measure(group), two.measure(group), strict=True):
            assert (ours.metrics, ours.facts, ours.files) == (theirs.metrics, theirs.facts, theirs.files)
            assert ours.hits.keys() == theirs.hits.keys()
            assert all(torch.equal(ours.hits[name], theirs.hits[name]) for name in ours.hits)
    counts = {name: crew.tasks.count(name) for name in dict.fromkeys(crew.tasks)}
    assert counts == {
        **{"encoded": 7 + 3, "sgd_loss": 4, "sgd_hits": 2, "finetune_loss": 4, "finetune_hits": 4, "changed": 2},
    }
