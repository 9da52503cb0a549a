"""One image file -> upright RGB pixels of 8 bits, and what had to be done for that. This module does not import torch."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rotssl.data.images import DataError
from rotssl.data.likeness import look

ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = 5  # from this orientation on, height and width change places


class Facts(NamedTuple):
    """What is known of an image once it is read.

    ``size`` is width and height after turning, ``turned`` whether an orientation tag turned it, ``transparent`` whether it was
    laid on white, ``deep`` whether its shades had more than 8 bits, ``content`` a checksum of the file, and ``look`` the hash of
    its looks (``likeness.look``).
    """

    size: tuple[int, int]
    turned: bool
    transparent: bool
    deep: bool
    content: int
    look: tuple[int, int]


def digest(content: bytes | memoryview) -> int:
    """A checksum of 64 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read(path: str) -> tuple[Image.Image, Facts]:
    """An image as RGB, upright, on white where it is transparent.

    Raises:
        DataError: it can't be decoded, or the range of its shades is unknown; the text begins with the path.
    """
    try:
        content = fetch(path)
    except OSError as error:
        raise DataError(f"{path} cannot be decoded as an image ({_cause(error, None)})") from error
    return decode(content, path)


def fetch(path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: it can't be read.
    """
    # A pipe without a writer would be waited for, so nothing is waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read()


def decode(content: bytes, path: str) -> tuple[Image.Image, Facts]:
    """The image of a file's content, as ``read``; the path is for messages."""
    with _one_kind_of_error(content, path), Image.open(BytesIO(content)) as image:
        rgb, turned, transparent, deep = upright(image)
    return rgb, Facts(rgb.size, turned, transparent, deep, digest(content), look(rgb))


def upright(image: Image.Image) -> tuple[Image.Image, bool, bool, bool]:
    """An opened image as RGB, upright, on white where it is transparent; and whether it was turned, transparent and deep.

    Raises:
        DataError: the range of its shades is unknown.
        Exception: of any kind, the file is damaged.
    """
    tag = _orientation(image)
    image.load()
    deep = image.mode[0] in "IF"
    shades = _to_8_bits(image) if deep else image
    transparent = not deep and _is_transparent(image)
    rgb = _on_white(shades) if transparent else shades.convert("RGB")
    # Pillow turns TIFF by itself.
    turned = tag != 1
    return rgb if image.format == "TIFF" or not turned else rgb.transpose(UPRIGHT[tag]), turned, transparent, deep


class Header(NamedTuple):
    """What is known of an image file without its pixels: format, upright width and height, orientation tag, and as in Facts."""

    kind: str
    size: tuple[int, int]
    orientation: int
    transparent: bool = False
    deep: bool = False


def check(content: bytes, path: str) -> Header:
    """Check that a file's content can be decoded; of a JPEG all of it is read, but few of its pixels are made.

    Raises:
        DataError: as ``read``.
    """
    with _one_kind_of_error(content, path), Image.open(BytesIO(content)) as image:
        kind, tag, (width, height) = str(image.format), _orientation(image), image.size
        if kind == "JPEG" and image.mode in ("L", "RGB"):
            image.draft(image.mode, (1, 1))
            image.load()
            return Header(kind, (height, width) if tag >= SIDEWAYS else (width, height), tag)
    _, facts = decode(content, path)
    return Header(kind, facts.size, 1 if kind == "TIFF" else tag, facts.transparent, facts.deep)


@contextmanager
def _one_kind_of_error(content: bytes, path: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # of any kind: damaged files make Pillow raise whatever they run into
        raise DataError(f"{path} cannot be decoded as an image ({_cause(error, content)})") from error


def _cause(error: Exception, content: bytes | None) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format" if content else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _orientation(image: Image.Image) -> int:
    """The orientation tag; 1, which is upright, if there is none."""
    try:
        tag = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of any kind: viewers, too, take damaged EXIF data for none
        return 1
    return tag if tag in UPRIGHT else 1


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Shades of more than 8 bits, or fractions, as 8 bits; Pillow would clip them to white or to black.

    Raises:
        DataError: the range of the shades is not known from the file.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values >= 0).all() or not (values <= 1).all():  # NaN, too
            raise DataError(
                "has fractional shades outside [0, 1], whose range is unknown: scale them, or use 8 or 16 bits"
            )
        shades: npt.NDArray[np.uint8] = (values * 255).round().astype(np.uint8)
    elif image.mode.startswith("I;16") or image.format in ("PPM", "PNG"):  # those two never have more than 16
        bits = tags.get(BITS, (16,))[0]
        shades = (values >> (bits - 8)).astype(np.uint8)
    else:
        raise DataError("has signed or 32-bit shades, whose range is unknown: convert it to 8 or 16 bits")
    # Pillow inverts "white is zero" for 8 bits only.
    return Image.fromarray(255 - shades if tags.get(PHOTOMETRIC) == 0 else shades)
