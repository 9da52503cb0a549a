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
