"""The parts with labels: class-balanced, the same everywhere, apart from validation and test."""

import numpy as np
import pytest

from rotssl.config.sections import DataConfig
from rotssl.data import datasets
from rotssl.data.images import ImageSet
from rotssl.evaluation.cards import digest as digest_of
from rotssl.evaluation.subsets import digest, listing, percent, subset

LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 500))  # a stream that numpy keeps


def test_parts_are_class_balanced_and_contain_each_other():
    small, large = subset(LABELS, 0.01), subset(LABELS, 0.1)
    assert np.bincount(LABELS[small]).tolist() == [5] * 10 and np.bincount(LABELS[large]).tolist() == [50] * 10
    assert set(small) < set(large) and (np.diff(large) > 0).all()
    assert subset(LABELS, 1).tolist() == list(range(5000))
    assert set(subset(LABELS, 0.1, seed=1)) != set(large)


def test_of_small_classes_all_is_taken_and_of_each_class_one():
    labels = np.array([0] * 90 + [1] * 8 + [2] * 2)
    assert np.bincount(labels[subset(labels, 0.3)]).tolist() == [10, 8, 2]
    assert np.bincount(labels[subset(labels, 0.001)]).tolist() == [1, 1, 1]


def test_parts_are_the_same_on_every_machine():
    found = {(share, seed): digest(subset(LABELS, share, seed), LABELS) for share in (0.01, 0.1) for seed in (0, 1)}
    assert found == {
        (0.01, 0): "10dceca4ba86d382",
        (0.01, 1): "a57f808985aa4c3f",
        (0.1, 0): "545fd0325400cd31",
        (0.1, 1): "2c53b765c213618e",
    }


def test_parts_of_the_sample_are_apart_from_validation_and_test_and_the_same_on_every_machine():
    config = DataConfig(name="fashion-mnist-sample", image_size=28)
    splits, test = datasets.load(config, 0.1), datasets.load_test(config)
    found = {}
    for share in (0.01, 0.1):
        part = splits.train.take(subset(splits.train.labels, share))
        ours = {image.tobytes() for image in part.images}
        for other in (splits.validation, test):
            assert not any(image.tobytes() in ours for image in other.images)
        found[share] = digest(subset(splits.train.labels, share), splits.train.labels)
    assert found == {0.01: "6bdc6d8573dc3508", 0.1: "e67719a53d2dc497"}
    assert digest_of(test) == "b4e25eb2b0e5ee39"


def test_the_digest_of_images_that_are_decoded_when_they_are_taken_is_of_their_files():
    class Lazy:
        def __init__(self, checksums):
            self.checksums = np.array(checksums, np.uint64)

    labels = np.arange(3)
    one, again, other = (digest_of(ImageSet(Lazy(sums), labels)) for sums in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    files = np.stack([np.array([1, 2, 3], np.uint64)] * 4, 1)
    in_folders = digest_of(ImageSet(Lazy(()), labels, files))
    assert in_folders == one == again != other


def test_the_list_names_images_and_labels():
    assert listing(np.array([3, 7]), np.arange(10) % 4) == "3 3\n7 3\n"


@pytest.mark.parametrize(("share", "name"), [(0.01, "1pct"), (0.1, "10pct"), (1, "100pct"), (0.005, "0.5pct")])
def test_shares_have_names(share, name):
    assert percent(share) == name
