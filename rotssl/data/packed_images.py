"""The images of a packed split, decoded when they are asked for: crops for the views, or the whole picture for evaluation."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torchcodec.decoders import decode_jpeg

from rotssl.base.rng import Positions
from rotssl.data.crops import Cut
from rotssl.data.images import DataError, Pixels
from rotssl.data.packed import Rows
from rotssl.data.reading import decode
from rotssl.data.shards import Shards

EVALUATED = (
    256 / 224
)  # short side of a picture, in sides of the square that is cut from its middle, as in the official codes
# What makes a stored picture upright, by its orientation tag: axes swapped, then columns mirrored, rows mirrored.
UPRIGHT = {
    **{1: (False, False, False), 2: (False, True, False), 3: (False, True, True), 4: (False, False, True)},
    **{5: (True, False, False), 6: (True, True, False), 7: (True, True, True), 8: (True, False, True)},
}
# Second bytes of a JPEG's markers: EXIF or XMP, one that is filled up, and the scan, after which no tags are read.
TAGS, FILL, SCAN = 0xE1, 0xFF, {b"\xda", b""}
EACH = 2  # images that a thread decodes at a time: with more, the last ones are waited for longer


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

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """Of the image files, (N,), as the index has them."""
        return self.rows["checksum"].astype(np.uint64)

    def subset(self, index: npt.NDArray[np.int64]) -> "PackedImages":
        """The images with these indices."""
        return PackedImages(self.shards, self.rows[index], self.side, self.interpolation)

    def sizes(self, index: Positions) -> tuple[Positions, Positions]:
        """Heights and widths of upright pictures, (B,) each."""
        rows = self.rows[index]
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def picture(self, index: int) -> Tensor:
        """A whole picture, upright, (H, W, 3) of uint8.

        Raises:
            DataError: it cannot be read or decoded.
        """
        row = self.rows[index]
        content = self.shards.read(int(row["shard"]), int(row["offset"]), int(row["length"]))
        found = _jpeg(content, int(row["orientation"]))
        size = row["height"], row["width"]
        if found is not None and found.shape[:2] == size:
            return found
        name = f"{self.shards.split.shards[row['shard']].file}, at {row['offset']}:"
        known = torch.from_numpy(np.array(decode(content, name)[0]))
        if known.shape[:2] != size:
            raise DataError(
                f"{name} has {known.shape[1]} x {known.shape[0]} pixels, the index says {size[1]} x {size[0]}"
            )
        return known

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
        made = torch.empty((len(index), int(ends[-1])), dtype=torch.uint8)

        def work(first: int) -> None:
            for i in range(first, min(first + EACH, len(index))):
                picture = self.picture(int(index[i]))
                for view, start, end in zip(views, ends, ends[1:], strict=False):
                    boxes, side = view.boxes, view.size
                    top, left = int(boxes.top[i]), int(boxes.left[i])
                    part = picture[top : top + int(boxes.height[i]), left : left + int(boxes.width[i])]
                    pixels = _resize(part, side, side, self.interpolation)
                    target = made[i, int(start) : int(end)].view(side, side, 3)
                    target.copy_(pixels.flip(1) if view.flipped[i] else pixels)

        self._each(work, range(0, len(index), EACH))
        return made.numpy()

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Pixels:
        """The evaluation's pictures, (B, 3, S, S): short side to 256 / 224 S, and the square in the middle."""
        chosen = np.arange(len(self))[index]
        made = np.empty((len(chosen), 3, self.side, self.side), np.uint8)

        def work(i: int) -> None:
            made[i] = middle(self.picture(int(chosen[i])), self.side, self.interpolation).permute(2, 0, 1)

        self._each(work, range(len(chosen)))
        return made

    def _each(self, work: Callable[[int], None], items: range) -> None:
        """Do some work in the threads that decode; whoever is interrupted ends their waiting, too."""
        try:
            for _ in _threads().map(work, items):
                pass
        except (KeyboardInterrupt, SystemExit):  # after an error another batch may still wait for its pictures
            self.end()
            raise

    def begin(self) -> None:
        """Wait again for a place that cannot be reached."""
        self.shards.stop.clear()

    def end(self) -> None:
        """End the waiting for a place that cannot be reached, because nobody takes the images any more."""
        self.shards.stop.set()


def middle(picture: Tensor, side: int, interpolation: str = "bilinear") -> Tensor:
    """The square in the middle of a picture whose short side is first resized, as torchvision's Resize and CenterCrop.

    Args:
        picture: (H, W, 3) of uint8.
        side: S.
        interpolation: bilinear or bicubic.

    Returns:
        (S, S, 3).
    """
    short = round(EVALUATED * side)
    height, width = picture.shape[:2]
    high, wide = (int(short * height / width), short) if width <= height else (short, int(short * width / height))
    top, left = round((high - side) / 2), round((wide - side) / 2)
    return _resize(picture, high, wide, interpolation)[top : top + side, left : left + side]


def _resize(part: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """(H, W, 3) of uint8 to another height and width, with antialiasing, as torchvision does it."""
    # A part that is not in one piece would be copied colour by colour, which takes longer than to resize it.
    whole = part.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(whole, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def _jpeg(content: bytes, orientation: int) -> Tensor | None:
    """A JPEG, upright, (H, W, 3); None: it is something else, or damaged."""
    if content[:2] != b"\xff\xd8":
        return None
    try:
        stored = decode_jpeg(_untagged(content)).permute(1, 2, 0)
    except RuntimeError:
        return None
    swapped, mirrored, turned = UPRIGHT[orientation]
    upright: Tensor = stored.transpose(0, 1) if swapped else stored
    axes = [axis for axis, back in enumerate((turned, mirrored)) if back]
    return upright.flip(axes) if axes else upright


def _untagged(content: bytes) -> bytes:
    """A JPEG without its EXIF and XMP: the index has the orientation, and decoders differ in the tags that they believe."""
    kept, at, marker = [], 0, 2
    while content[marker : marker + 1] == b"\xff" and content[marker + 1 : marker + 2] not in SCAN:
        if content[marker + 1] == FILL:
            marker += 1
            continue
        end = marker + 2 + int.from_bytes(content[marker + 2 : marker + 4], "big")
        if content[marker + 1] == TAGS:
            kept.append(content[at:marker])
            at = end
        marker = end
    return b"".join([*kept, content[at:]]) if kept else content


def _alone() -> None:
    """Let torch use no further threads in a thread that decodes: there is one for each core."""
    # Threads that have used torch keep their number; those that use it for the first time after this have one, too.
    torch.set_num_threads(1)


_pools: dict[int, ThreadPoolExecutor] = {}
_making = Lock()


def _threads() -> ThreadPoolExecutor:
    """The threads of this process that decode: its share of the cores; a forked process has its own."""
    with _making:
        if os.getpid() not in _pools:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            own = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            _pools[os.getpid()] = ThreadPoolExecutor(max(1, min(32, own)), "decode", _alone)
        return _pools[os.getpid()]
