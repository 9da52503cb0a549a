"""One run, explained: the map of its features, nearest neighbours, and what its rotation head does, on held-out pictures."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rotssl.base.paths import AnyPath
from rotssl.config import ResolvedConfig
from rotssl.config.fields import ConfigError
from rotssl.data import datasets
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, choose
from rotssl.engine.runtime import indexed
from rotssl.evaluation.measure import bank_of, encode_share
from rotssl.explain import features
from rotssl.explain.model import restored
from rotssl.explain.turns import Confusion, Head

BANK = 5000  # training pictures that neighbours are looked for among
SHOWN = 8  # pictures that are shown with their neighbours and their saliency
NEIGHBOURS = 7

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Map:
    """Pictures in the plane.

    Attributes:
        kind: ``PCA`` or ``UMAP``.
        places: (N, 2).
        shares: of the variance along each axis, for PCA.
    """

    kind: str
    places: npt.NDArray[np.float32]
    shares: tuple[float, float] | None = None


@dataclass(frozen=True)
class Near:
    """A picture with its nearest training pictures, uint8 (C, H, W) each.

    Attributes:
        picture: the picture.
        label: its class, or None.
        found: the nearest ones, with class and cosine, the nearest first.
    """

    picture: Pixels
    label: int | None
    found: list[tuple[Pixels, int | None, float]]


@dataclass(frozen=True)
class Turns:
    """What the rotation head does.

    Attributes:
        confusion: over all pictures.
        by_class: class -> number of its pictures, and share of right judgements; the hardest first.
        hardest: pictures, (C, H, W) each, that are judged wrong at the most angles.
        salient: pictures and what in them tells the angle, (C, H, W) and (S, S) from 0 to 1.
    """

    confusion: Confusion
    by_class: dict[int, tuple[int, float]]
    hardest: list[tuple[Pixels, int | None, float]]
    salient: list[tuple[Pixels, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Explained:
    """All of it.

    Attributes:
        epoch: number of epochs behind the checkpoint.
        classes: names of the classes.
        split: name of the split that the pictures are of.
        labels: of the pictures, (N,), or None.
        maps: PCA, and UMAP if it is installed.
        near: some pictures with their neighbours.
        same: share of the neighbours of all pictures that have the picture's class; None without labels.
        bank: number of training pictures that the neighbours are from.
        turns: None without a rotation head.
    """

    epoch: int
    classes: tuple[str, ...]
    split: str
    labels: npt.NDArray[np.int64] | None
    maps: list[Map]
    near: list[Near]
    same: float | None
    bank: int
    turns: Turns | None


def explain(folder: AnyPath, config: ResolvedConfig, splits: datasets.Splits, most: int) -> Explained:
    """Explain the newest checkpoint of a run.

    Args:
        folder: of the run.
        config: its configuration.
        splits: its images.
        most: largest number of pictures, balanced over the classes.

    Raises:
        ConfigError: there is no checkpoint, or there are too few pictures.
    """
    device = indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, epoch = restored(folder, config, device)
    held_out = splits.validation is not None
    shown, split = (splits.validation, "validation") if splits.validation is not None else (splits.train, "training")
    data = shown.take(_chosen(shown, most))
    if len(data) < 2:
        raise ConfigError(f"--images: got {len(data)} of the {split} pictures, expected at least 2")
    bank = splits.train.take(bank_of(splits.train, BANK) if held_out else _chosen(splits.train, BANK))
    augment = Augment(config.views, config.data.image_size, *datasets.normalization(config.data.name), 0)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    encoder = model.chosen(config.evaluation.network)
    mine, theirs = (encode_share(encoder, part, augment, device, layout) for part in (data, bank))
    places, shares = features.pca(mine)
    maps = [Map("PCA", places.cpu().numpy(), shares)]
    if (umap := features.umap(mine)) is not None:
        maps.append(Map("UMAP", umap.numpy()))
    examples = _examples(data)
    near, same = _near(data, bank, mine, theirs, examples, held_out)
    turns = None
    if "rotation" in model.tasks and config.rotation.loss == "cross_entropy":  # else the head names no angle
        pixels = torch.cat([augment.evaluation(torch.from_numpy(part)) for part in _parts(data)]).to(device)
        turns = _turns(Head(model), data, pixels, examples)
    return Explained(epoch, splits.classes, split, data.labels, maps, near, same, len(bank), turns)


def _chosen(data: ImageSet, most: int) -> npt.NDArray[np.int64]:
    return np.arange(len(data)) if len(data) <= most else choose(data.labels, len(data), most)


def _parts(data: ImageSet, size: int = 512) -> list[Pixels]:
    return [np.asarray(data.images[np.arange(i, min(i + size, len(data)))]) for i in range(0, len(data), size)]


def _examples(data: ImageSet) -> list[int]:
    """The first picture of each of the first classes, then others in their order: none is picked by how it looks."""
    first = [] if data.labels is None else [int(np.flatnonzero(data.labels == c)[0]) for c in np.unique(data.labels)]
    others = (i for i in range(len(data)) if i not in set(first))
    return [*first, *others][: min(SHOWN, len(data))]


def _near(
    data: ImageSet, bank: ImageSet, mine: Tensor, theirs: Tensor, examples: list[int], held_out: bool
) -> tuple[list[Near], float | None]:
    # Without a held-out split a picture may be its own nearest neighbour, which is left out.
    count = min(NEIGHBOURS, len(theirs) - (not held_out))
    cosines, index = features.nearest(mine, theirs, count + (not held_out))
    if not held_out:
        cosines, index = cosines[:, 1:], index[:, 1:]
    cosines, index = cosines.cpu(), index.cpu()
    same = None
    if data.labels is not None and bank.labels is not None:
        same = float((bank.labels[index.numpy()] == data.labels[:, None]).mean())
    own, near = _pictures(data, examples), []
    for i, picture in zip(examples, own, strict=True):
        rows = index[i].tolist()
        found = zip(_pictures(bank, rows), _labels(bank, rows), cosines[i].tolist(), strict=True)
        near.append(Near(picture, _labels(data, [i])[0], list(found)))
    return near, same


def _turns(head: Head, data: ImageSet, pixels: Tensor, examples: list[int]) -> Turns:
    confusion = head.confusion(pixels)
    by_class: dict[int, tuple[int, float]] = {}
    if data.labels is not None:
        of = {int(c): np.flatnonzero(data.labels == c) for c in np.unique(data.labels)}
        shares = {c: (len(rows), float(confusion.right[rows].mean())) for c, rows in of.items()}
        by_class = dict(sorted(shares.items(), key=lambda item: item[1][1]))
    hardest = torch.argsort(confusion.right, stable=True)[:SHOWN].tolist()
    pictures = zip(_pictures(data, hardest), _labels(data, hardest), confusion.right[hardest].tolist(), strict=True)
    maps = head.saliency(pixels[examples]).cpu().numpy()
    return Turns(confusion, by_class, list(pictures), list(zip(_pictures(data, examples), maps, strict=True)))


def _pictures(data: ImageSet, rows: list[int]) -> list[Pixels]:
    return list(np.asarray(data.images[np.array(rows, dtype=np.int64)]))


def _labels(data: ImageSet, rows: list[int]) -> list[int | None]:
    return [None if data.labels is None else int(data.labels[row]) for row in rows]
