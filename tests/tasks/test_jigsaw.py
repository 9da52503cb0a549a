"""The jigsaw task: its permutations, its tiles and its loss."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from rotssl.base.step import StepContext
from rotssl.config.tasks import JigsawConfig
from rotssl.tasks import permutations
from rotssl.tasks.base import Targets
from rotssl.tasks.jigsaw import FLAT, Jigsaw, cut, normalize
from rotssl.tasks.permutations import permutation_set


def distances(orders):
    return (orders[:, None] != orders[None]).sum(2)[np.triu_indices(len(orders), 1)]


def context(positions, seed=0, epoch=0, batch_size=None):
    positions = np.asarray(positions)
    return StepContext(seed, epoch, 0, 0.0, positions, int(positions[0]), batch_size or len(positions))


def noise(count, side, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def task(dim=4, **fields):
    torch.manual_seed(0)
    return Jigsaw(JigsawConfig(**{"weight": 1.0, **fields}), dim)


# --- orders --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "count"), [(1, 1), (3, 6), (4, 1), (4, 24), (9, 100)])
def test_orders_are_distinct_and_hold_every_tile_once(tiles, count):
    orders = permutation_set(tiles, count)
    assert orders.shape == (count, tiles) and orders.dtype == np.int64 and not orders.flags.writeable
    assert len({tuple(order) for order in orders.tolist()}) == count
    assert all(sorted(order) == list(range(tiles)) for order in orders.tolist())


def test_all_permutations_are_those_of_itertools():
    for tiles in range(1, 7):
        np.testing.assert_array_equal(
            permutations.all_permutations(tiles).T, list(itertools.permutations(range(tiles)))
        )


def test_orders_are_the_greedy_choice_written_out():
    orders = permutation_set(5, 20).tolist()
    candidates = list(itertools.permutations(range(5)))
    for size in range(1, 20):
        gaps = [[sum(a != b for a, b in zip(one, two, strict=True)) for two in orders[:size]] for one in candidates]
        best = max(range(len(candidates)), key=lambda i: (min(gaps[i]), sum(gaps[i]), -i))
        assert orders[size] == list(candidates[best])


def test_a_hundred_orders_of_nine_are_far_apart_and_the_same_on_every_machine():
    permutation_set.cache_clear()
    orders = permutation_set(9, 100)
    assert distances(orders).min() == 6
    assert distances(orders).mean() == pytest.approx(8.08, abs=0.005)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert distances(np.array([rng.permutation(9) for _ in range(100)])).min() < 6
    digest = hashlib.sha256(orders.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "5d85ff3ba895c4fc"
    np.testing.assert_array_equal(permutation_set(9, 40), orders[:40])
    assert permutation_set(9, 100) is orders  # generated once in a process


@pytest.mark.parametrize(("tiles", "count"), [(4, 25), (4, 0), (1, 2)])
def test_more_orders_than_there_are_is_refused(tiles, count):
    with pytest.raises(ValueError, match=f"{count} orders of {tiles} tiles"):
        permutation_set(tiles, count)


# --- tiles ---------------------------------------------------------------------------------------------------------------------


def windows(image, side):
    """Every window of an image, normalised: (rows, columns, 3, side, side)."""
    found = image.unfold(1, side, 1).unfold(2, side, 1).permute(1, 2, 0, 3, 4).double()
    return (found - found.mean((3, 4), keepdim=True)) / found.std((3, 4), correction=0, keepdim=True)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("grid", "count", "size", "side"), [(2, 24, 28, 12), (3, 100, 28, 8), (3, 10, 43, 12), (2, 24, 8, 3)]
)
def test_undoing_the_labelled_order_puts_every_tile_back_into_its_cell(grid, count, size, side):
    jigsaw, images, batch = task(grid=grid, permutations=count), noise(32, size), 32
    (tiles,), targets = jigsaw.transform([images, noise(32, size, 1)], context(range(batch)))
    assert tiles.shape == (grid * grid * batch, 3, side, side)
    assert targets.rows is None and targets.count == batch
    (labels,) = targets.labels
    assert labels.dtype == torch.int64 and labels.shape == (batch,)
    cell, offsets = size // grid, set()
    for b in range(batch):
        found = windows(images[b], side)
        for place, source in enumerate(permutation_set(grid * grid, count)[labels[b]]):
            # The one window of the whole image that this tile is.
            gaps = (found - tiles[place * batch + b].double()).abs().amax((2, 3, 4))
            row, column = divmod(int(gaps.argmin()), gaps.shape[1])
            assert gaps[row, column] < 1e-4 and (gaps < 1e-2).sum() == 1
            assert (row // cell, column // cell) == (source // grid, source % grid)
            offsets.add((row % cell, column % cell))
    # All offsets with the tile inside of its cell, and no others.
    assert offsets == set(itertools.product(range(cell - side + 1), repeat=2))


def test_a_tile_is_64_of_75_pixels_as_in_the_paper():
    labels, corners, side = task().layout(225, context(range(4000)))
    assert side == 64
    offsets = corners % 75
    assert offsets.min() == 0 and offsets.max() == 11
    # Offsets are even and have nothing to do with one another or with the label.
    columns = np.concatenate([offsets.reshape(4000, -1), labels[:, None]], axis=1)
    assert np.abs(columns[:, :-1].mean(0) - 5.5).max() < 0.25
    assert np.abs(np.corrcoef(columns.T) - np.eye(19)).max() < 0.08
    assert np.bincount(labels, minlength=100).min() > 10
    # Draws of one stream would be those of other images: 18 numbers at position q are the single ones at 18 q and on.
    assert abs(np.corrcoef(labels[: 18 * 222], offsets[:222].ravel())[0, 1]) < 0.08


def test_draws_depend_on_seed_epoch_and_position_alone():
    jigsaw = task()

    def drawn(*args, **more):
        labels, corners, _ = jigsaw.layout(48, context(*args, **more))
        return labels, corners

    whole = drawn(range(64))
    for part in (
        drawn(range(64)),
        [np.concatenate(p) for p in zip(drawn(range(40)), drawn(range(40, 64)), strict=True)],
    ):
        for one, other in zip(whole, part, strict=True):
            np.testing.assert_array_equal(one, other)
    others = [drawn(range(64, 128)), drawn(range(64), seed=1), drawn(range(64), epoch=1)]
    for other in others:
        assert (other[0] == whole[0]).sum() < 10 and (other[1] == whole[1]).mean() < 0.5


def test_the_halves_of_a_batch_have_the_tiles_of_the_whole():
    jigsaw, images = task(), noise(16, 28)
    (whole,), asked = jigsaw.transform([images], context(range(16)))
    halves = [jigsaw.transform([images[at]], context(range(16)[at], batch_size=16)) for at in (slice(8), slice(8, 16))]
    tiles = torch.cat([half.unflatten(0, (9, 8)) for (half,), _ in halves], dim=1)
    assert torch.equal(tiles.flatten(0, 1), whole)
    assert torch.equal(torch.cat([targets.labels[0] for _, targets in halves]), asked.labels[0])
    assert [targets.count for _, targets in halves] == [16, 16]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_have_the_memory_layout_of_the_images(layout):
    images = noise(4, 16)
    (tiles,), _ = task().transform([images.contiguous(memory_format=layout)], context(range(4)))
    assert tiles.is_contiguous(memory_format=layout)
    assert torch.equal(tiles, task().transform([images], context(range(4)))[0][0])


def test_tiles_need_no_memory_to_be_counted():
    # On the meta device a host synchronisation is an error.
    (tiles,), _ = task().transform([torch.empty(4, 3, 16, 16, device="meta")], context(range(4)))
    assert tiles.shape == (36, 3, 4, 4) and tiles.device.type == "meta"


def test_every_channel_of_a_tile_is_normalised():
    scale = torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1, 1)
    tiles = normalize(noise(5, 8) * scale + 3)
    assert tiles.mean((2, 3)).abs().max() < 1e-5
    assert (tiles.std((2, 3), correction=0) - 1).abs().max() < 1e-5


def test_flat_tiles_stay_flat():
    image = torch.full((2, 3, 24, 24), 0.7) + 1e-6 * noise(2, 24)  # the rounding of an augmentation
    image[1, :, :8, :8] = noise(1, 8)[0]
    (tiles,), _ = task(permutations=2).transform([image], context(range(2)))
    spread = tiles.std((2, 3), correction=0)
    assert torch.isfinite(tiles).all()
    assert ((spread > 0.9) | (spread < 1e-5 / FLAT)).all()
    assert (spread.amax(1) > 0.9).sum() == 1


def test_cut_takes_rows_by_top_and_columns_by_left():
    image = torch.arange(2 * 36).view(2, 1, 6, 6)
    tiles = cut(image, torch.tensor([[0, 1], [3, 4]]), torch.tensor([[2, 0], [4, 3]]), 2)
    assert tiles[:, 0].tolist() == [[[2, 3], [8, 9]], [[42, 43], [48, 49]], [[22, 23], [28, 29]], [[63, 64], [69, 70]]]


# --- loss ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1, 2])
def test_loss_is_the_mean_cross_entropy_over_the_images_of_all_workers(share):
    jigsaw, batch = task(dim=5, grid=2, permutations=7), 6
    features = torch.randn(4 * batch, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 2, 5])
    # Of a batch of 12 these 6 are one worker's half; the other worker's are not there to add to the sum.
    out = jigsaw.loss([features], Targets([labels], None, share * batch))
    rows = torch.stack([torch.cat([features[place * batch + b] for place in range(4)]) for b in range(batch)])
    logits = jigsaw.head(rows).tolist()
    each = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(logits, labels.tolist(), strict=True)]
    assert out.loss.item() == pytest.approx(sum(each) / batch / share, rel=1e-5)
    right = sum(row.index(max(row)) == label for row, label in zip(logits, labels.tolist(), strict=True))
    assert out.logs["accuracy"].item() == pytest.approx(right / batch / share)
    assert not out.logs["accuracy"].requires_grad
    out.loss.backward()
    assert (features.grad.abs().sum(1) > 0).all()
    for name, parameter in jigsaw.head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_at_the_start_it_guesses():
    jigsaw, batch = task(dim=16, grid=2, permutations=24), 4000
    labels = torch.randint(24, (batch,), generator=torch.Generator().manual_seed(2))
    out = jigsaw.loss([torch.randn(4 * batch, 16)], Targets([labels], None, batch))
    sigma = math.sqrt(23 / 24**2 / batch)
    assert abs(out.logs["accuracy"].item() - 1 / 24) < 4 * sigma
    assert out.loss.item() == pytest.approx(math.log(24), abs=0.2)


def test_half_precision_features_give_a_loss_in_full_precision():
    jigsaw = task(dim=8, grid=2, permutations=5).to(torch.bfloat16)
    labels = torch.tensor([0, 1, 2])
    assert jigsaw.loss([torch.randn(12, 8).bfloat16()], Targets([labels], None, 3)).loss.dtype == torch.float32


def test_the_weight_follows_its_schedule():
    assert [task(weight=2.0, schedule="linear").weight(progress) for progress in (0, 0.5, 1)] == [2, 1, 0]
    assert task(weight=2.0).weight(0.9) == 2


@pytest.mark.parametrize("grid", [2, 3])
def test_a_few_steps_learn_it_where_tiles_show_their_cell(grid):
    # Each cell is a slope of its own direction, which neither the offset nor the normalisation hides. The encoder knows nothing.
    angles = torch.arange(grid * grid) * 2 * math.pi / grid**2
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    cells = (angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y).unflatten(0, (grid, grid))
    image = cells.permute(0, 2, 1, 3).reshape(1, 1, 12 * grid, 12 * grid).expand(64, 3, -1, -1)
    jigsaw = task(dim=300, grid=grid, permutations=20, hidden_dim=64)
    optimizer = torch.optim.SGD(jigsaw.parameters(), lr=0.2, momentum=0.9)
    losses, accuracy = [], 0.0
    for epoch in range(15):
        (tiles,), targets = jigsaw.transform([image], context(range(64), epoch=epoch))
        out = jigsaw.loss([tiles.flatten(1)], targets)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        accuracy = out.logs["accuracy"].item()
    assert losses[0] > 2.5 and losses[-1] < 0.2 and accuracy > 0.95
