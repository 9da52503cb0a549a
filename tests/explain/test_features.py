"""Maps and neighbours, against plain arithmetic."""

import sys
from types import SimpleNamespace

import numpy as np
import torch

from rotssl.explain import features


def test_pca_has_the_singular_vectors_of_numpy_and_points_to_the_largest_loading():
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=gen) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.5, 0.1]) + 7
    places, shares = features.pca(x)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    expected *= np.sign(np.take_along_axis(axes[:2].T, np.abs(axes[:2].T).argmax(0)[None], 0))
    np.testing.assert_allclose(places.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shares, values[:2] ** 2 / (values**2).sum(), rtol=1e-9)
    assert torch.equal(features.pca(x)[0], places)


def test_nearest_is_the_order_of_the_cosines():
    gen = torch.Generator().manual_seed(2)
    queries, bank = torch.randn(3, 5, generator=gen), torch.randn(9, 5, generator=gen) * torch.arange(1, 10)[:, None]
    cosines, index = features.nearest(queries, bank, 4)
    for row, query in enumerate(queries):
        each = torch.nn.functional.cosine_similarity(query[None], bank)
        order = each.argsort(descending=True)[:4]
        assert index[row].tolist() == order.tolist()
        torch.testing.assert_close(cosines[row], each[order])


def test_umap_is_asked_only_where_it_is_installed(monkeypatch):
    x = torch.randn(20, 4)
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    assert features.umap(x) is None
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, array):
            return array[:, :2]

    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    assert torch.equal(features.umap(x), x[:, :2])
    assert asked == {"metric": "cosine", "random_state": 0, "n_jobs": 1}
    assert features.umap(x[:10]) is None  # too few for its neighbourhoods
