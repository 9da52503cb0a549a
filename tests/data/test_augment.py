"""Views of images: each operation is torchvision's, and a sample's draws are its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from scipy.stats import ks_2samp
from torchvision import transforms as T

from rotssl.base import rng
from rotssl.config.views import ViewsConfig
from rotssl.data import augment, pixels
from rotssl.data.augment import Augment, Crop
from rotssl.data.crops import Crops
from tests.data.views import POSITIONS, pictures, step_at

PLAIN = ViewsConfig(global_scale=(1.0, 1.0), jitter_p=0.0, grayscale=0.0, blur=(0.0,), solarize=(0.0,), flip=0.0)


def views(config, images, size=28, epoch=0, positions=POSITIONS, seed=0):
    """Views in [0, 1]: mean 0 and deviation 1 leave out the normalisation."""
    return Augment(config, size, (0.0,), (1.0,), seed)(images, step_at(0.0, epoch, positions)).full


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def crop(images, boxes, flip, size):
    ticks = augment.crop_grid(boxes, np.array([flip] * len(images)), *images.shape[2:], size)
    return augment.crop_resize(images, *(torch.from_numpy(axis).float() for axis in ticks))


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 28), (32, 48, 24), (64, 40, 33)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_is_torchvision_s(height, width, size, flip):
    images = pictures(height=height, width=width).float() / 255
    crops = augment.draw_crops(rng.key("crop"), POSITIONS, height, width, (0.05, 1.0))
    crops.top[0], crops.left[0], crops.height[0], crops.width[0] = 0, 0, height, width
    crops.top[1], crops.left[1], crops.height[1], crops.width[1] = height - 1, width - 1, 1, 1
    ours = crop(images, crops, flip, size)
    for i in range(12):
        box = [int(side[i]) for side in (crops.top, crops.left, crops.height, crops.width)]
        theirs = tvf.resized_crop(images[i], *box, [size, size], antialias=False)
        close(ours[i], tvf.hflip(theirs) if flip else theirs)


def test_nothing_outside_of_the_crop_shines_in():
    images = torch.ones(1, 3, 28, 28)
    images[:, :, 5:15, 8:20] = 0.5
    box = Crops(*(np.array([value]) for value in (5, 8, 10, 12)))
    close(crop(images, box, False, 28), torch.full((1, 3, 28, 28), 0.5))


TVF = {
    "brightness": (pixels.brightness_, tvf.adjust_brightness, (0.0, 0.3, 1.0, 1.8)),
    "contrast": (pixels.contrast_, tvf.adjust_contrast, (0.0, 0.3, 1.0, 1.8)),
    "saturation": (pixels.saturation_, tvf.adjust_saturation, (0.0, 0.3, 1.0, 1.8)),
    "hue": (pixels.hue_, tvf.adjust_hue, (-0.5, -0.1, 0.0, 0.07, 0.3, 0.5)),
}


@pytest.mark.parametrize("name", TVF)
def test_each_colour_operation_is_torchvision_s(name):
    ours, theirs, factors = TVF[name]
    images = pictures(4).float() / 255
    images[0, :, :2] = torch.tensor([0.0, 1.0, 0.5]).repeat(28)[:28]  # grays, black and white have no hue
    images[1, 1] = images[1, 0]  # ties between channels
    for factor in factors:
        # Each sample has a factor of its own; the others' must not touch it.
        each = torch.tensor([factor, *factors[:3]]).view(-1, 1, 1, 1)
        result = ours(images.clone(), each)
        for image, own, got in zip(images, each.flatten(), result, strict=True):
            close(got, theirs(image, float(own)))


@pytest.mark.parametrize("side", [28, 32, 96])
def test_blur_is_torchvision_s(side):
    images = pictures(4, height=side, width=side).float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    kernel = {28: 3, 32: 3, 96: 9}[side]  # a tenth of the side, odd
    ours = pixels.gaussian_blur_(images.clone(), sigma.view(-1, 1, 1, 1))
    for i in range(4):
        close(ours[i], tvf.gaussian_blur(images[i], [kernel, kernel], [float(sigma[i])] * 2))


def test_luma_is_torchvision_s():
    images = pictures(4).float() / 255
    close(pixels.luma(images), tvf.rgb_to_grayscale(images))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.3)])
@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 150)])
def test_crops_are_distributed_as_torchvision_s(scale, height, width):
    count = 4000
    crops = augment.draw_crops(rng.key("boxes"), np.arange(count), height, width, scale)
    ours = np.stack([crops.top, crops.left, crops.height, crops.width], 1).astype(float)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)], float)
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()

    def measures(boxes):
        top, left, h, w = boxes.T
        rows, columns = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return np.stack([h * w / (height * width), np.log(w / h), top / rows, left / columns, h, w], 1)

    a, b = measures(ours), measures(theirs)
    error = np.sqrt(a.var(0) / count + b.var(0) / count)
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error + 1e-12).all()
    np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.06)


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10)])
def test_a_crop_that_cannot_fit_is_torchvision_s_central_one(height, width):
    crops = augment.draw_crops(0, np.arange(50), height, width, (1.0, 1.0))
    box = T.RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    boxes = np.stack([crops.top, crops.left, crops.height, crops.width], 1)
    np.testing.assert_array_equal(boxes, np.tile(box, (50, 1)))


def jitter(x, strengths, p):
    steps = augment.draw_jitter(rng.key("jitter"), np.arange(len(x)), strengths, p)
    slices, rows, factors = pixels.sort_steps([steps], coloured=True)
    return pixels.apply_steps(x.clone(), slices, torch.from_numpy(rows), torch.from_numpy(factors))


def test_each_sample_gets_its_own_operations_in_its_own_order():
    images = pictures(40).float() / 255
    steps = augment.draw_jitter(rng.key("jitter"), np.arange(40), (0.4, 0.4, 0.4, 0.1), 0.8)
    theirs = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue]
    expected = list(images)
    for ops, factors in zip(steps.ops, steps.factors, strict=True):
        for i, (op, factor) in enumerate(zip(ops, factors, strict=True)):
            expected[i] = theirs[op](expected[i], factor) if op != pixels.NOTHING else expected[i]
    assert 0 < (steps.ops == pixels.NOTHING).mean() < 0.5
    close(jitter(images, (0.4, 0.4, 0.4, 0.1), 0.8), torch.stack(expected))


def test_colour_operations_come_in_every_order_equally_often(monkeypatch):
    orders = {i: [] for i in range(4800)}

    def spy(name):
        def operation(x, factor):
            for index in x[:, 0, 0, 0].tolist():
                orders[round(index)].append(name)
            return x

        return operation

    monkeypatch.setattr(pixels, "OPS", [spy(name) for name in "bcsh"])
    x = torch.arange(4800.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    jitter(x, (0.4, 0.4, 0.4, 0.1), 1.0)
    seen, counts = np.unique(["".join(order) for order in orders.values()], return_counts=True)
    assert len(seen) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-squared of 23 degrees of freedom at 0.1%


def test_jitter_factors_and_probability_are_as_configured(monkeypatch):
    seen = {name: [] for name in "bcsh"}

    def spy(name):
        return lambda x, factor: seen[name].extend(factor.flatten().tolist()) or x

    monkeypatch.setattr(pixels, "OPS", [spy(name) for name in "bcsh"])
    x = torch.zeros(4000, 3, 1, 1)
    jitter(x, (0.4, 0.0, 1.0, 0.1), 0.8)
    assert seen["c"] == []
    for name, low, high in (("b", 0.6, 1.4), ("s", 0.0, 2.0), ("h", -0.1, 0.1)):
        assert 0.78 < len(seen[name]) / 4000 < 0.82
        assert low <= min(seen[name]) < low + 0.01 * (high - low)
        assert high >= max(seen[name]) > high - 0.01 * (high - low)
        assert np.mean(seen[name]) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def crop_measures(x):
    """Of a picture whose red is the column and whose green is the row: centre and size of the crop, and its mirroring."""
    left, right, top, bottom = x[:, 0, :, 0].mean(1), x[:, 0, :, -1].mean(1), x[:, 1, 0].mean(1), x[:, 1, -1].mean(1)
    return [left + right, top + bottom, (right - left).abs(), bottom - top, right - left]


def hue_angle(x):
    red, green, blue = x[:, :, 0, 0].unbind(1)
    return [torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)]


STATISTICS = {
    "crop and flip": (
        T.Compose([T.RandomResizedCrop(16, (0.2, 1.0), antialias=False), T.RandomHorizontalFlip(0.3)]),
        {"global_scale": (0.2, 1.0), "flip": 0.3},
        crop_measures,
    ),
    "brightness": (T.ColorJitter(0.4), {"jitter": (0.4, 0, 0, 0)}, lambda x: [x.mean((1, 2, 3))]),
    "contrast": (T.ColorJitter(0, 0.4), {"jitter": (0, 0.4, 0, 0)}, lambda x: [x.flatten(1).std(1)]),
    "saturation": (
        T.ColorJitter(0, 0, 1.0),
        {"jitter": (0, 0, 1, 0)},
        lambda x: [(x.amax(1) - x.amin(1)).mean((1, 2))],
    ),
    "hue": (T.ColorJitter(0, 0, 0, 0.4), {"jitter": (0, 0, 0, 0.4)}, hue_angle),
    "everything": (
        T.Compose([T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8), T.RandomGrayscale(0.2)]),
        {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grayscale": 0.2},
        lambda x: [*x.mean((2, 3)).unbind(1), x.amax((1, 2, 3)), x.amin((1, 2, 3)), x.std((1, 2, 3)), *hue_angle(x)],
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", STATISTICS)
def test_pictures_are_distributed_as_torchvision_s(name):
    transform, given, measures = STATISTICS[name]
    count, size = 2000, 16
    if name == "crop and flip":
        ramp = torch.arange(24.0).expand(24, 24) * 10
        picture = torch.stack([ramp, ramp.T, ramp * 0]).byte()
    else:
        picture = pictures(1, height=size, width=size)[0]
    torch.manual_seed(0)
    theirs = torch.stack([transform(picture.float() / 255) for _ in range(count)])
    config = replace(PLAIN, **{"jitter_p": float("jitter" in given), **given})
    ours = views(config, picture.expand(count, -1, -1, -1), size, positions=np.arange(count))[0]
    for a, b in zip(measures(ours), measures(theirs), strict=True):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 0.001


ALL = ViewsConfig(jitter_p=1.0, blur=(1.0, 0.5), solarize=(0.3, 0.0))


def test_a_sample_does_not_depend_on_the_rest_of_its_batch():
    images = pictures()
    whole = views(ALL, images)
    changed = images.clone()
    changed[1:] = 255 - changed[1:]
    for first, other, alone in zip(
        whole, views(ALL, changed), views(ALL, images[:1], positions=POSITIONS[:1]), strict=True
    ):
        assert torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])
        close(alone[0], first[0], 1e-6)
    halves = [views(ALL, images[part], positions=POSITIONS[part]) for part in (slice(0, 6), slice(6, 12))]
    for v in range(2):
        close(torch.cat([half[v] for half in halves]), whole[v], 1e-6)


def test_views_repeat_exactly_and_differ_by_view_epoch_position_and_seed():
    images = pictures(1).expand(12, -1, -1, -1)
    first, second = views(ALL, images)
    again = views(ALL, images)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    for other in (second, views(ALL, images, epoch=1)[0], views(ALL, images, seed=1)[0], first.roll(1, 0)):
        assert ((first - other).abs().amax((1, 2, 3)) > 0.01).all()


def test_gray_images_of_one_channel_are_those_of_three():
    images = pictures(channels=1)
    config = replace(ALL, solarize=(0.0,))  # its threshold would magnify what rounding does
    for one, three in zip(views(config, images), views(config, images.expand(-1, 3, -1, -1)), strict=True):
        assert one.shape == three.shape == (12, 3, 28, 28)
        # The weights of red, green and blue add up to 0.9999, in torchvision too.
        close(one, three, 5e-4)


OPERATIONS = {
    "flip": ({"flip": 1.0}, tvf.hflip),
    "grayscale": ({"grayscale": 1.0}, lambda x: tvf.rgb_to_grayscale(x, 3)),
    "solarize": ({"solarize": (1.0,)}, lambda x: tvf.solarize(x, 0.5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_probabilities_zero_one_and_between(name):
    given, operation = OPERATIONS[name]
    images = pictures(400, height=8, width=8)
    untouched, applied = images.float() / 255, operation(images.float() / 255)
    positions = np.arange(400)
    close(views(PLAIN, images, 8, positions=positions)[0], untouched)
    close(views(replace(PLAIN, **given), images, 8, positions=positions)[0], applied)
    half = {name: 0.5 if name != "solarize" else (0.5,)}
    got = views(replace(PLAIN, **half), images, 8, positions=positions)[0]
    is_applied = (got - applied).abs().amax((1, 2, 3)) < 1e-5
    close(torch.where(is_applied.view(-1, 1, 1, 1), applied, untouched), got)
    assert 0.42 < is_applied.float().mean() < 0.58


def test_blur_takes_every_sigma_and_each_view_has_its_own_probability(monkeypatch):
    seen = []
    monkeypatch.setattr(pixels, "OPS", [*pixels.OPS[: pixels.BLUR], lambda x, sigma: seen.append(sigma.flatten())])
    images = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8)
    views(replace(PLAIN, blur=(1.0, 0.25)), images, 4, positions=np.arange(2000))
    views(PLAIN, images, 4, positions=np.arange(2000))
    assert len(seen) == 2
    assert len(seen[0]) == 2000
    assert 0.21 < len(seen[1]) / 2000 < 0.29
    assert 0.1 <= seen[0].min() < 0.12
    assert 1.98 < seen[0].max() <= 2.0
    assert float(seen[0].mean()) == pytest.approx(1.05, abs=0.05)


def test_evaluation_sees_the_whole_image_resized_and_normalised():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = pictures(height=40, width=40)
    for size in (40, 28, 64):
        expected = tvf.normalize(tvf.resize(images.float() / 255, [size, size], antialias=True), mean, std)
        close(Augment(PLAIN, size, mean, std, 0).evaluation(images), expected)
    gray = Augment(PLAIN, 40, (0.3,), (0.5,), 0).evaluation(images[:, :1])
    close(gray, ((images[:, :1].float() / 255 - 0.3) / 0.5).expand(-1, 3, -1, -1))


def test_views_are_normalised():
    images, (mean, std) = pictures(), ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    got = Augment(PLAIN, 28, mean, std, 0)(images, step_at()).full[1]
    close(got, tvf.normalize(images.float() / 255, mean, std))


def test_local_views_and_crops_of_tasks_have_their_own_size_and_scale_and_leave_the_global_views_alone(monkeypatch):
    boxes = {}
    draw = augment.draw_crops

    def spy(stream, positions, height, width, scale):
        drawn = draw(stream, positions, height, width, scale)
        boxes.setdefault(scale, []).append(drawn.height * drawn.width / (height * width))
        return drawn

    monkeypatch.setattr(augment, "draw_crops", spy)
    images, config = pictures(), replace(ALL, local_count=3, local_size=12, local_scale=(0.05, 0.14))
    made = Augment(config, 28, (0.0,), (1.0,), 0, {"puzzle": Crop(16, (0.4, 0.5))})(images, step_at())
    assert [view.shape[2] for view in made.local] == [12, 12, 12] and made.own["puzzle"][0].shape == (12, 3, 16, 16)
    assert not torch.equal(made.local[0], made.local[1])
    assert len(boxes[0.05, 0.14]) == 3 and np.min(boxes[0.05, 0.14]) > 0.03 and np.max(boxes[0.05, 0.14]) < 0.17
    assert np.min(boxes[0.4, 0.5]) > 0.35 and np.max(boxes[0.4, 0.5]) < 0.55
    for ours, plain in zip(made.full, views(ALL, images), strict=True):
        assert torch.equal(ours, plain)
