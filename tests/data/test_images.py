"""Which images are chosen."""

import numpy as np

from rotssl.data import images


def test_choose_is_balanced_sorted_and_the_same_each_time():
    labels = np.repeat([0, 1, 2, 3], [50, 50, 50, 3])
    index = images.choose(labels, 153, 43)
    assert index.tolist() == sorted(set(index.tolist()))
    # The class of three gives all it has; what it lacks goes to the others.
    assert sorted(np.bincount(labels[index]).tolist()) == [3, 13, 13, 14]
    assert np.array_equal(index, images.choose(labels, 153, 43))
    assert index.tolist() != list(range(43))
    assert len(images.choose(None, 100, 7)) == 7
    assert images.choose(labels, 153, 500).tolist() == list(range(153))
    assert set(images.choose(labels, 153, 20)) < set(index)


def test_a_holdout_is_the_same_share_of_each_class_and_never_a_whole_class():
    labels = np.repeat(np.arange(7), [300, 20, 12, 6, 3, 2, 1])
    index = images.hold_out(labels, 0.1)
    assert index.tolist() == sorted(set(index.tolist()))
    assert np.bincount(labels[index], minlength=7).tolist() == [30, 2, 1, 1, 0, 0, 0]
    half = np.bincount(labels[images.hold_out(labels, 0.5)], minlength=7)
    assert half[:5].tolist() == [150, 10, 6, 3, 2] and half[6] == 0
    # However much is asked for, each class keeps an image to learn from.
    left = np.setdiff1d(np.arange(len(labels)), images.hold_out(labels, 0.999))
    assert np.bincount(labels[left], minlength=7).tolist() == [1] * 7


def test_a_holdout_of_classes_of_equal_size_is_what_a_balanced_choice_was():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 30))
    for share in (0.1, 0.25, 0.33, 0.5):  # of 210: also counts that seven does not divide
        assert np.array_equal(images.hold_out(labels, share), images.choose(labels, 210, round(210 * share)))
