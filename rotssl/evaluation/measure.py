"""Measures of an encoder: features of all images, and the metrics computed from them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rotssl.base import distributed, heartbeat
from rotssl.base.precision import autocast, exact_float32
from rotssl.data.augment import Augment
from rotssl.data.images import ImageSet, Pixels, choose
from rotssl.data.loader import AHEAD, input_threads, prefetch
from rotssl.evaluation.collapse import effective_rank
from rotssl.evaluation.hits import top1
from rotssl.evaluation.knn import QUERIES, knn_hits
from rotssl.evaluation.linear import HISTORY, held_out, linear_hits
from rotssl.evaluation.protocol import KNN_K, KNN_TEMPERATURE

BATCH = 512  # images of a forward pass


def bank_of(train: ImageSet, most: int | None) -> npt.NDArray[np.int64]:
    """Indices of the training images whose features others are compared with: all, or so many, of all classes alike."""
    return np.arange(len(train)) if most is None or most >= len(train) else choose(train.labels, len(train), most)


@dataclass(frozen=True)
class Features:
    """Features of a set, of which each worker has a share, in the order of their ranks; all have as many rows.

    Attributes:
        rows: of this worker, (ceil(N / workers), D); those beyond the end of the set are its first ones again.
        labels: of the whole set, (N,) int64.
    """

    rows: Tensor
    labels: Tensor

    @property
    def first(self) -> int:
        """Index of this worker's first row."""
        return distributed.rank() * len(self.rows)

    @property
    def count(self) -> int:
        """How many rows are no repetition."""
        return max(0, min(len(self.rows), len(self.labels) - self.first))

    def own(self, of_all: Tensor) -> Tensor:
        """Of something about the whole set, (N, ...), what is this worker's, without repetition."""
        return of_all[self.first : self.first + self.count]

    def own_labels(self) -> Tensor:
        """Labels of ``rows``."""
        index = torch.arange(self.first, self.first + len(self.rows), device=self.labels.device)
        return self.labels[index % len(self.labels)]


@torch.no_grad()
def encode_share(
    encoder: nn.Module,
    data: ImageSet,
    augment: Augment,
    device: torch.device,
    layout: torch.memory_format,
    kind: torch.dtype | None = None,
    batch: int = BATCH,
    chosen: npt.NDArray[np.int64] | None = None,
    change: Callable[[Pixels, int], Pixels] | None = None,
) -> Tensor:
    """Features (ceil(N / workers), D) of this worker's share of N images; the encoder stays in evaluation mode.

    Args:
        encoder: (B, 3, S, S) -> (B, D).
        data: the images.
        augment: provides the normalisation.
        device: device of the encoder.
        layout: memory format of the images.
        kind: of half precision to encode in, as in training; None: float32. The features are float32.
        batch: images per forward pass.
        chosen: indices of the N images; None: all.
        change: of the images of a batch, uint8 (B, C, H, W), the first of which has a place in this worker's share.
    """
    encoder.eval()
    chosen = np.arange(len(data.images)) if chosen is None else chosen
    count, share = len(chosen), -(-len(chosen) // distributed.world_size())
    own = np.arange(distributed.rank() * share, (distributed.rank() + 1) * share) % count  # the last share wraps around

    def make(i: int) -> Tensor:
        images = data.images[chosen[own[i * batch : (i + 1) * batch]]]
        return torch.from_numpy(images if change is None else change(images, i * batch))

    # In another thread where there is something to wait for: a copy to a GPU, or images that are decoded now.
    steps = -(-share // batch)
    if not isinstance(data.images, np.ndarray):
        data.images.begin()
    wait = device.type == "cuda" or not isinstance(data.images, np.ndarray)
    parts = []
    threads = input_threads(data.images)
    for images in prefetch(make, steps, AHEAD, threads=threads) if wait else map(make, range(steps)):
        x = augment.evaluation(images.to(device)).contiguous(memory_format=layout)
        with exact_float32() if kind is None else autocast(device, kind):
            parts.append(encoder(x).float())
        heartbeat.beat()
    return torch.cat(parts)


@dataclass(frozen=True)
class Measure:
    """A measure: the function that computes it on all workers together, and one that takes about as much memory on each alone."""

    compute: Callable[[], float]
    trial: Callable[[], object]


def measures(
    bank: Features,
    queries: Features,
    probe: bool,
    kind: torch.dtype = torch.float32,
    hits: dict[str, Tensor] | None = None,
    neighbours: tuple[int, float] = (KNN_K, KNN_TEMPERATURE),
) -> dict[str, Measure]:
    """``knn/top1``, ``feature/effective_rank`` and, with a probe, ``linear/top1``; accuracies are rank 0's, of all queries.

    Args:
        bank: training features.
        queries: features to classify.
        probe: whether to train a linear probe.
        kind: data type of kNN's cosines.
        neighbours: k and T of kNN.
        hits: where rank 0 puts which queries were classified correctly, (M,) bool, as ``knn`` and ``linear``.
    """
    rows, labels = bank.rows[: bank.count], bank.own(bank.labels)
    held = bank.own(held_out(bank.labels))
    given = rows, labels, queries.rows, queries.own_labels()

    few = rows, labels, queries.rows[:QUERIES], queries.own_labels()[:QUERIES]
    wide, workers = rows.shape[1] + 1, distributed.world_size()

    def room(*numbers: int) -> list[Tensor]:
        """Memory that a measure takes on several workers beside what it takes on one, in numbers of double precision."""
        return [rows.new_empty(number, dtype=torch.float64) for number in numbers]

    def try_knn() -> None:
        kept = room(4 * workers * QUERIES * neighbours[0])
        knn_hits(*few, kind, *neighbours)
        del kept

    def try_probe() -> None:
        kept = room(HISTORY * (1 + int(bank.labels.max())) * wide)  # two of single precision for each iteration
        linear_hits(*given, held, 1)
        del kept

    def accuracy(name: str, found: Tensor | None) -> float:
        if found is None:
            return top1(None)
        of_all = distributed.gather_to(found.to(torch.uint8), 0)[: len(queries.labels)].bool()
        if hits is not None:
            hits[name] = of_all
        return top1(of_all)

    found = {
        "knn/top1": Measure(lambda: accuracy("knn", knn_hits(*given, kind, *neighbours)), try_knn),
        "feature/effective_rank": Measure(
            lambda: effective_rank(queries.rows[: queries.count]), lambda: room(wide**2, wide**2)
        ),
    }
    if probe:
        found["linear/top1"] = Measure(lambda: accuracy("linear", linear_hits(*given, held)), try_probe)
    return found
