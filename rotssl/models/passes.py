"""Several views through a network, in as few forward passes as BatchNorm's statistics allow."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from rotssl.models import norm

Network = Callable[[Tensor], Tensor]


def parts(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The consecutive parts of a tensor along its first dimension, which ``joined`` recognises; they keep their content."""
    found = list(whole.split(list(sizes)))
    for i, part in enumerate(found):
        part.cut_from = whole, i, len(found)
    return found


def _whole(views: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which the views are all parts, in their order."""
    places = [getattr(view, "cut_from", None) for view in views]
    whole = places[0][0] if places and places[0] else None
    same = whole is not None and all(
        place and place[0] is whole and place[1:] == (i, len(views)) for i, place in enumerate(places)
    )
    return whole if same else None


def joined(views: Sequence[Tensor]) -> Tensor:
    """All rows in one tensor: the only view, the tensor that ``parts`` cut (its gradient is in one piece, too), or a copy."""
    if len(views) == 1:
        return views[0]
    whole = _whole(views)
    return torch.cat(list(views)) if whole is None else whole


def as_one(change: Network, views: Sequence[Tensor]) -> list[Tensor]:
    """Apply what changes no number of rows to all views at once where they are the parts of one tensor, else to each."""
    found: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: id(getattr(view, "cut_from", (view,))[0])):
        alike = list(group)
        whole = _whole(alike)
        found += [change(view) for view in alike] if whole is None else parts(change(whole), [*map(len, alike)])
    return found


def together(network: nn.Module, views: list[Tensor], joint: bool) -> list[Tensor]:
    """The same views of one size, in one tensor if they pass the network together; ``joint`` as for ``each_view``."""
    if not (joint or norm.keeps_views_apart(network)):
        return views
    return parts(joined(views), [len(view) for view in views])


def each_view(network: nn.Module, views: list[Tensor], joint: bool = False, run: Network | None = None) -> list[Tensor]:
    """What a network makes of each view; consecutive views of one size share a pass if possible.

    Args:
        network: any network, of which a view is a batch.
        views: each (n, ...).
        joint: whether views of one size form one batch for BatchNorm. Otherwise each view is normalised separately; views still
            share a pass if the network supports per-view statistics.
        run: called in place of the network, which it calls.
    """
    run = run or network
    outputs: list[Tensor] = []
    apart = not joint and norm.keeps_views_apart(network)
    for _, group in groupby(views, key=lambda view: view.shape[1:] if joint else view.shape):
        alike = list(group)
        if len(alike) == 1 or not (joint or apart):
            outputs += [run(view) for view in alike]
            continue
        with norm.per_view_statistics(len(alike)) if apart else nullcontext():
            outputs += parts(run(joined(alike)), [len(view) for view in alike])
    return outputs
