"""The images of a packed split, decoded when they are asked for: crops for the views, or the whole picture for evaluation."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image

from rotssl.base.rng import Positions
from rotssl.data.crops import Cut
from rotssl.data.images import DataError, Pixels
from rotssl.data.packed import Rows
from rotssl.data.reading import UPRIGHT, decode
from rotssl.data.shards import Shards

EVALUATED = (
    256 / 224
)  # short side of a picture, in sides of the square that is cut from its middle, as in the official codes
EACH = 4  # images that a thread decodes at a time
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class PackedImages:
    """Images by index, as an array (N, 3, S, S) of uint8 whose rows are made when they are taken.

    Attributes:
        shards: the files.
        rows: of the index, (N,).
        side: S, of the views and of the evaluation's picture.
        interpolation: of all resizing, with antialiasing.
    """

    shards: Shards
    rows: Rows
    side: int
    interpolation: str = "bilinear"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, S, S)."""
        return len(self.rows), 3, self.side, self.side

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, index: npt.NDArray[np.int64]) -> "PackedImages":
        """The images with these indices."""
        return PackedImages(self.shards, self.rows[index], self.side, self.interpolation)

    def sizes(self, index: Positions) -> tuple[Positions, Positions]:
        """Heights and widths of upright pictures, (B,) each."""
        rows = self.rows[index]
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def picture(self, index: int) -> Image.Image:
        """A whole picture, upright, in RGB.

        Raises:
            DataError: it cannot be read or decoded.
        """
        row = self.rows[index]
        content = self.shards.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        name = f"{self.shards.split.shards[row['shard']].file}, at {row['offset']}:"
        try:
            with Image.open(BytesIO(content)) as image:
                if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                    return decode(content, name)[0]
                image.load()
                rgb = image.convert("RGB")
        except DataError:
            raise
        except Exception as error:  # of any kind: damaged files make Pillow raise whatever they run into
            raise DataError(f"{name} cannot be decoded any more ({error})") from error
        return rgb if row["orientation"] == 1 else rgb.transpose(UPRIGHT[int(row["orientation"])])

    def cuts(self, index: Positions, views: Sequence[Cut]) -> Pixels:
        """Views of a batch, each picture decoded once.

        Args:
            index: of the images, (B,).
            views: what to cut.

        Returns:
            (B, sum of 3 S^2 over the views): for each view its pixels as (S, S, 3).

        Raises:
            DataError: an image cannot be read or decoded.
        """
        ends = np.cumsum([0, *(3 * view.size**2 for view in views)])
        made = np.empty((len(index), ends[-1]), np.uint8)
        how = INTERPOLATIONS[self.interpolation]

        def work(first: int) -> None:
            for i in range(first, min(first + EACH, len(index))):
                picture = self.picture(int(index[i]))
                for view, start, end in zip(views, ends, ends[1:], strict=False):
                    boxes, side = view.boxes, view.size
                    left, top = int(boxes.left[i]), int(boxes.top[i])
                    box = left, top, left + int(boxes.width[i]), top + int(boxes.height[i])
                    # Cut first, as torchvision: resizing with a box would read beyond its edges.
                    pixels = np.asarray(picture.crop(box).resize((side, side), how))
                    made[i, start:end].reshape(side, side, 3)[:] = pixels[:, ::-1] if view.flipped[i] else pixels

        self._each(work, range(0, len(index), EACH))
        return made

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Pixels:
        """The evaluation's pictures, (B, 3, S, S): short side to 256 / 224 S, and the square in the middle."""
        chosen = np.arange(len(self))[index]
        made = np.empty((len(chosen), 3, self.side, self.side), np.uint8)

        def work(i: int) -> None:
            made[i] = np.asarray(middle(self.picture(int(chosen[i])), self.side, self.interpolation)).transpose(2, 0, 1)

        self._each(work, range(len(chosen)))
        return made

    def _each(self, work: Callable[[int], None], items: range) -> None:
        """Do some work in the threads that decode; whoever is interrupted ends their waiting, too."""
        self.shards.stop.clear()
        try:
            for _ in _threads().map(work, items):
                pass
        except BaseException:
            self.shards.stop.set()
            raise

    def end(self) -> None:
        """End the waiting for a place that cannot be reached, because nobody takes the images any more."""
        self.shards.stop.set()


def middle(picture: Image.Image, side: int, interpolation: str = "bilinear") -> Image.Image:
    """The square in the middle of a picture whose short side is first resized, as torchvision's Resize and CenterCrop."""
    short = round(EVALUATED * side)
    width, height = picture.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = picture.resize(size, INTERPOLATIONS[interpolation])
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    return resized.crop((left, top, left + side, top + side))


_pools: dict[int, ThreadPoolExecutor] = {}
_making = Lock()


def _threads() -> ThreadPoolExecutor:
    """The threads of this process that decode: its share of the cores; a forked process has its own."""
    with _making:
        if os.getpid() not in _pools:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            own = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            _pools[os.getpid()] = ThreadPoolExecutor(max(1, min(32, own)), "decode")
        return _pools[os.getpid()]
