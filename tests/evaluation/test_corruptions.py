"""Every corruption on images made by hand, whose result can be said; and that a severity is worse than the one before."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from rotssl.evaluation import corruptions, plan
from rotssl.evaluation.corruptions import CORRUPTIONS, corrupted, turned

GEN = np.random.default_rng(0)


def change(name, x, c):
    return CORRUPTIONS[name].change(x, c, np.random.default_rng(0))


def even(value=0.5, side=64, channels=3):
    return torch.full((2, channels, side, side), value)


def pictures(side=32):
    """A smooth picture with an edge, of (B, 3, S, S) uint8."""
    y, x = np.mgrid[0:side, 0:side] / side
    planes = [128 + 90 * np.sin(6 * x + 2 * y), 200 * y, np.where(x > 0.4, 180, 60)]
    return np.stack([np.stack(planes), np.stack(planes[::-1])]).astype(np.uint8)


def test_the_plan_knows_their_names():
    assert tuple(CORRUPTIONS) == plan.CORRUPTIONS


def test_noises_have_the_mean_and_the_deviation_that_they_say():
    x = even(0.5)
    for name, c, deviation in (
        ("gaussian_noise", 0.1, 0.1),
        ("speckle_noise", 0.2, 0.1),
        ("shot_noise", 50, math.sqrt(0.5 / 50)),
    ):
        found = change(name, x, c)
        assert float(found.mean()) == pytest.approx(0.5, abs=0.002) and found.shape == x.shape
        assert float(found.std()) == pytest.approx(deviation, rel=0.02), name
    black, white = (change("speckle_noise", even(v), 0.2).std() for v in (0.0, 1.0))
    assert black == 0 and float(white) == pytest.approx(0.2, rel=0.02)
    found = change("impulse_noise", x, 0.2)
    shares = [float((found == value).float().mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.1, 0.8, 0.1], abs=0.01)


def test_gaussian_blur_is_scipy_s():
    x = torch.from_numpy(GEN.random((2, 3, 20, 24), np.float32))
    for c in (0.4, 1, 3):
        expected = ndimage.gaussian_filter(x.numpy(), (0, 0, c, c), mode="nearest", truncate=4)
        assert np.abs(change("gaussian_blur", x, c).numpy() - expected).max() < 1e-5


def test_defocus_is_the_mean_over_a_disk():
    kernel = corruptions.disk(3, 0.1)
    y, x = np.mgrid[-3:4, -3:4]
    assert kernel.shape == (7, 7) and np.abs(kernel.numpy() - (x**2 + y**2 <= 9) / 29).max() < 1e-6
    soft = corruptions.disk(4, 0.5)
    assert float(soft.sum()) == pytest.approx(1) and torch.allclose(soft, soft.T) and (soft >= 0).all()
    assert corruptions.disk(10, 0.5).shape == (21, 21) and corruptions.disk(0.3, 0.4).shape == (3, 3)
    point = torch.zeros(1, 1, 15, 15)
    point[..., 7, 7] = 1
    found = change("defocus_blur", point, (3, 0.1))[0, 0]
    assert torch.allclose(found[4:11, 4:11], kernel) and float(found.sum()) == pytest.approx(1)


def test_zoom_blur_keeps_the_middle_and_moves_the_rest():
    assert torch.allclose(change("zoom_blur", even(0.3), (1.0, 1.1, 1.2)), even(0.3))
    x = torch.from_numpy(GEN.random((1, 3, 32, 32), np.float32))
    assert torch.allclose(change("zoom_blur", x, (1.0,)), x, atol=1e-6)  # the mean of twice the same
    part = ndimage.zoom(x[0].numpy()[:, 2:29, 2:29], (1, 1.2, 1.2), order=1)  # 27 of 32 pixels, enlarged to 32
    assert np.abs(2 * change("zoom_blur", x, (1.2,))[0].numpy() - x[0].numpy() - part).max() < 1e-5


def test_brightness_raises_the_value_and_keeps_hue_and_saturation():
    x = torch.tensor([0.2, 0.4, 0.1, 0.0]).view(1, 1, 2, 2) * torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    found = change("brightness", x, 0.2)
    assert torch.allclose(found[0, 0].flatten(), torch.tensor([0.4, 0.6, 0.3, 0.2]))
    assert torch.allclose(found[0, 1].flatten(), torch.tensor([0.2, 0.3, 0.15, 0.2]))  # black becomes gray
    assert float(change("brightness", even(0.9), 0.3).max()) == 1


def test_contrast_is_the_distance_from_the_channel_s_mean():
    x = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2).expand(1, 3, 4, 2)
    assert torch.allclose(change("contrast", x, 0.5)[0, 0, 0], torch.tensor([0.3, 0.5]))


def test_pixelate_makes_boxes_and_jpeg_is_pillow_s():
    x = torch.from_numpy(GEN.integers(0, 256, (2, 3, 8, 8))).float() / 255
    boxes = (change("pixelate", x, 0.5) * 255).round().byte()
    means = torch.nn.functional.avg_pool2d(x * 255, 2)
    assert (boxes[..., ::2, ::2] == boxes[..., 1::2, 1::2]).all()
    assert float((boxes[..., ::2, ::2] - means).abs().max()) <= 1
    pixels = pictures()
    file = io.BytesIO()
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(file, "JPEG", quality=40)
    assert (corrupted(pixels, "jpeg", 5)[0] == np.asarray(Image.open(file)).transpose(2, 0, 1)).all()
    assert corrupted(pixels[:, :1], "jpeg", 5).shape == (2, 1, 32, 32)  # gray images too


@pytest.mark.parametrize("side", [32, pytest.param(96, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_each_severity_is_further_from_the_image_than_the_one_before(name, side):
    pixels = pictures(side)
    found = [corrupted(pixels, name, severity) for severity in range(1, 6)]
    away = [np.abs(made.astype(float) - pixels).mean() for made in found]
    assert all(made.shape == pixels.shape and made.dtype == np.uint8 for made in found)
    # Of small images zoom blur's first two severities enlarge by as many pixels.
    assert all(before < after for before, after in itertools.pairwise(away[1:])) and 0 < away[0] < away[2]
    assert (away[0] < away[1] or name == "zoom_blur") and away[4] > 1
    assert (corrupted(pixels, name, 3) == found[2]).all()  # the same again
    if "noise" in name:
        assert (corrupted(pixels, name, 3, seed=1) != found[2]).any()
        assert (corrupted(pixels, name, 3, first=512) != found[2]).any()


def test_images_are_turned_counterclockwise():
    pixels = np.zeros((1, 1, 5, 5), np.uint8)
    pixels[0, 0, 0, 2] = 200  # at the top
    assert turned(pixels, 0)[0, 0, 0, 2] == 200 and turned(pixels, 90)[0, 0, 2, 0] == 200
    assert turned(pixels, 180)[0, 0, 4, 2] == 200 and turned(pixels, 270)[0, 0, 2, 4] == 200
    line = np.zeros((1, 1, 33, 33), np.uint8)
    line[0, 0, :16, 16] = 255
    found = turned(line, 45)[0, 0].astype(int)  # a line from the middle up points up and left
    assert found[8, 8] > 100 and found[8, 24] == 0 and found[24, 24] == 0
    smooth = ndimage.gaussian_filter(GEN.random((40, 60)) * 255, 3)[None, None].astype(np.uint8)
    theirs = ndimage.rotate(smooth[0, 0].astype(float), 30, reshape=False, order=1, mode="mirror")
    assert np.abs(turned(smooth, 30)[0, 0].astype(float) - theirs)[10:30, 15:45].max() <= 1.5
