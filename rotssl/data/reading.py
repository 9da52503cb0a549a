"""One image file -> upright RGB pixels of 8 bits, and what had to be done for that. This module does not import torch."""

import hashlib
import os
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rotssl.data.images import DataError
from rotssl.data.likeness import look

ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        # A pipe without a writer would be waited for, so nothing is waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            content = file.read()
        with Image.open(BytesIO(content)) as image:
            tag = _orientation(image)
            image.load()
            deep = image.mode[0] in "IF"
            shades = _to_8_bits(image) if deep else image
            transparent = not deep and _is_transparent(image)
            rgb = _on_white(shades) if transparent else shades.convert("RGB")
            # Pillow turns TIFF by itself.
            upright = rgb if image.format == "TIFF" or tag == 1 else rgb.transpose(_UPRIGHT[tag])
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # of any kind: damaged files make Pillow raise whatever they run into
        raise DataError(f"{path} cannot be decoded as an image ({_cause(error, path)})") from error
    return upright, Facts(upright.size, tag != 1, transparent, deep, digest(content), look(upright))


def _cause(error: Exception, path: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty file" if os.path.getsize(path) == 0 else "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _orientation(image: Image.Image) -> int:
    """The orientation tag; 1, which is upright, if there is none."""
    try:
        tag = image.getexif().get(ORIENTATION, 1)
    except Exception:  # of any kind: viewers, too, take damaged EXIF data for none
        return 1
    return tag if tag in _UPRIGHT else 1


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
