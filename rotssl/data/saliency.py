"""Where the objects of pictures are, guessed from their pixels alone, and crops that show them (table 2 of the paper)."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rotssl.base import rng
from rotssl.base.rng import Floats, Mask, Positions
from rotssl.base.step import StepContext
from rotssl.data.crops import Crops
from rotssl.data.images import Pixels

Sums = npt.NDArray[np.int64]


def saliency(images: Pixels) -> Sums:
    """The saliency of each pixel: the squared distance of its colour from the usual one of the picture's border.

    The border is mostly background (the boundary prior of Wei et al., "Geodesic Saliency Using Background Priors", ECCV 2012). An
    object is what differs from a reference colour (Achanta et al., "Frequency-tuned Salient Region Detection", CVPR 2009, whose
    reference is the picture's mean colour). The usual colour is the lower median of each channel over the outermost pixels, so
    that an object that touches the border does not change it. A picture of one colour is equally salient everywhere.

    Args:
        images: (B, C, H, W).

    Returns:
        (B, H, W), squared levels of 255, summed over channels.
    """
    sides = images[:, :, [0, -1], :], images[:, :, 1:-1, [0, -1]]
    border = np.concatenate([side.reshape(*images.shape[:2], -1) for side in sides], 2)
    middle = (border.shape[2] - 1) // 2
    usual = np.partition(border, middle, 2)[:, :, middle].astype(np.int32)
    found = np.zeros((len(images), *images.shape[2:]), np.int64)
    for channel in range(images.shape[1]):  # one by one, which needs less memory
        found += (images[:, channel] - usual[:, channel, None, None]) ** 2
    found[found.max((1, 2)) == 0] = 1
    return found


@dataclass(frozen=True)
class Judge:
    """Says which crops of a batch's pictures show their objects; from integral images, which take four look-ups per box.

    Attributes:
        sums: saliency above and left of each pixel's corner, (B, H + 1, W + 1).
        chosen: whose crops are chosen by saliency, (B,).
        least: smallest share of a picture's saliency in a good crop; 0: a good crop is more salient on average than its picture
            (Addepalli et al. 2021, appendix A2).
    """

    sums: Sums
    chosen: Mask
    least: float

    @classmethod
    def of(cls, images: Pixels, ctx: StepContext, share: float, least: float) -> "Judge":
        """The judge of a part of a step's batch.

        Args:
            images: (B, C, H, W).
            ctx: context of the step, with the positions of these B samples.
            share: of the images of each global batch whose crops are chosen, rounded to images. Which ones is a function of the
                seed, the epoch and the position.
            least: see the class.
        """
        sums = np.zeros((len(images), images.shape[2] + 1, images.shape[3] + 1), np.int64)
        inner = sums[:, 1:, 1:]
        np.cumsum(saliency(images), 1, out=inner)
        np.cumsum(inner, 2, out=inner)
        order = rng.permutation(rng.key(ctx.seed, ctx.epoch, "good crops", ctx.batch_start), ctx.batch_size)
        return cls(sums, order[ctx.positions - ctx.batch_start] < round(share * ctx.batch_size), least)

    def mass(self, boxes: Crops, rows: Positions) -> Floats:
        """Share of their picture's saliency in boxes of some samples, 0 to 1, (R,).

        Args:
            boxes: R boxes.
            rows: of their samples in the batch, (R,).
        """
        top, left, bottom, right = boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width
        sums = self.sums
        inside = sums[rows, bottom, right] - sums[rows, top, right] - sums[rows, bottom, left] + sums[rows, top, left]
        share: Floats = inside / sums[rows, -1, -1]
        return share

    @property
    def bar(self) -> float:
        """The lowest score of a good crop."""
        return self.least or math.nextafter(1.0, 2.0)  # the whole picture, at 1, is not more salient than itself

    def score(self, boxes: Crops, rows: Positions) -> Floats:
        """How good boxes are, (R,): their share of the saliency, or of ``least`` 0 their mean saliency over their picture's."""
        if self.least:
            return self.mass(boxes, rows)
        high, wide = (side - 1 for side in self.sums.shape[1:])
        ratio: Floats = self.mass(boxes, rows) / (boxes.height * boxes.width / (high * wide))
        return ratio

    def asked(self, boxes: Crops, rows: Positions) -> Floats:
        """The score of the chosen samples' boxes; infinity for the others, whose crops are left alone."""
        return np.where(self.chosen[rows], self.score(boxes, rows), np.inf)

    def good(self, boxes: Crops, rows: Positions) -> Mask:
        """Which boxes are good, (R,)."""
        return self.score(boxes, rows) >= self.bar
