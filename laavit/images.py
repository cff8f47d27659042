"""Opening an image file: always upright, always RGB, and one sentence for every file that is no whole image.

What a viewer shows is what a model gets, and pixel boxes are read in that frame: EXIF-rotated photographs are turned
upright first. An animation is its first frame, transparency is laid on white, 16 bits are scaled to 8 (Pillow's own
conversion clips them), and CMYK and palettes become RGB.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from laavit.registry import UserError

#: The formats that are opened at all; others that Pillow knows start programs (EPS) or read other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")

#: The most pixels an image may have, checked in its header: 30,000 x 30,000 decoded would take 2.7 GB.
MAX_PIXELS = 178_956_970

#: What Pillow's decoders raise on a damaged file, as found by flipping and cutting bytes (tests/test_images.py).
BROKEN = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,  # AVIF
    MemoryError,
    struct.error,
    zlib.error,
)

_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_LOCK = threading.RLock()


def open_image(path: Any) -> Image.Image:
    """An RGB image of 8 bits, upright as its EXIF data say.

    Args:
        path: the file's path.

    Raises:
        UserError: the file is missing, is no image of ``FORMATS``, is cut short or damaged, or has more than
            ``MAX_PIXELS`` pixels; whatever other libraries have told Pillow to tolerate.
    """
    with _opened(path) as image:
        with _whole_files_only():
            image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def image_size(path: Any) -> tuple[int, int]:
    """(width, height) of the upright image, from the file's header: the pixels are not decoded.

    Raises:
        UserError: as ``open_image``, as far as a header tells.
    """
    with _opened(path) as image:
        turned = _orientation(image) in _SWAPPED
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _opened(path: Any) -> Iterator[Image.Image]:
    """The file as Pillow's lazy image; whatever goes wrong while it is in use is one sentence about the file."""
    try:
        if not Path(path).is_file():  # a pipe or a device would be waited for
            found = "is a folder" if Path(path).is_dir() else "does not exist or is no file"
            raise UserError(f"the image '{path}' cannot be read: it {found}")
        Image.init()  # all plugins, once: Pillow does not look for those of a restricted list by itself
        # an open file in place of its name: Pillow maps a named TIFF with width and height exchanged when it is rotated
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"the image '{path}' cannot be read: {image.width} x {image.height} pixels are more than "
                    f"{MAX_PIXELS} in all"
                )
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"the image '{path}' cannot be read: it is none of {', '.join(FORMATS)}") from None
    except BROKEN as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the image '{path}' cannot be read: {said}") from None


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Truncated files are refused inside, though lmms-eval lets them through for the whole process."""
    with _LOCK:
        tolerated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = tolerated


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that ``image.size`` does not yet follow; pixels are not decoded."""
    if image.format == "TIFF":
        return 1  # Pillow turns these by itself
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # else Pillow would decode the pixels to look behind them
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image)
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits: 16 bits by their full range, 32 bits and floats by the range that they use."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds grey values that are not finite")
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (float(values.min()), float(values.max()))
    shares = (values - low) / ((high - low) or 1.0)
    return Image.fromarray(np.round(255 * shares).astype(np.uint8)).convert("RGB")
