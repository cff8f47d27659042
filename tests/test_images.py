"""Every file is one upright RGB image of 8 bits, or one sentence; what other libraries tolerate does not matter."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from laavit.images import image_size, open_image
from laavit.registry import UserError


def noise(width: int = 40, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def written(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A valid header of side x side pixels, and hardly any pixels behind it."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = PngImagePlugin._crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_images_are_turned_upright_and_sizes_are_of_the_upright_frame(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    picture = Image.new("L", (40, 20))
    picture.paste(255, (0, 0, 10, 10))  # the stored top left corner
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = written(tmp_path / f"turned.{suffix}", picture, exif=exif)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == ((20, 40) if orientation >= 5 else (40, 20))
    assert image_size(path) == opened.size
    bright = np.argwhere(np.asarray(opened)[:, :, 0] > 128)
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    row, column = bright.mean(0) / np.asarray(opened.size[::-1])
    assert ("t" if row < 0.5 else "b") + ("l" if column < 0.5 else "r") == corner


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = open_image(written(tmp_path / f"deep.{suffix}", Image.fromarray(ramp)))
    assert opened.mode == "RGB" and np.abs(np.asarray(opened)[:, :, 0].flatten() - np.arange(256.0)).max() <= 1


def test_floats_spread_over_their_own_range_and_must_be_finite(tmp_path: Path) -> None:
    ramp = np.linspace(-2, 6, 256, dtype=np.float32).reshape(16, 16)
    opened = open_image(written(tmp_path / "float.tiff", Image.fromarray(ramp)))
    assert np.abs(np.asarray(opened)[:, :, 1].flatten() - np.arange(256.0)).max() <= 1
    flat = open_image(written(tmp_path / "flat.tiff", Image.fromarray(np.full((4, 4), 3, np.int32))))
    assert np.asarray(flat).max() == 0
    ramp[0, 0] = np.nan
    with pytest.raises(UserError, match=r"float\.tiff.*not finite"):
        open_image(written(tmp_path / "float.tiff", Image.fromarray(ramp)))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    for path, solid in (
        (written(tmp_path / "clear.png", clear), (10, 20, 30)),
        (written(tmp_path / "palette.png", palette, transparency=1), (255, 0, 0)),
        (written(tmp_path / "palette.gif", palette, transparency=1), (255, 0, 0)),
    ):
        opened = open_image(path)
        assert opened.getpixel((0, 0)) == solid and opened.getpixel((3, 3)) == (255, 255, 255), path


def test_other_modes_and_the_first_frame(tmp_path: Path) -> None:
    cmyk = open_image(written(tmp_path / "c.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
    assert np.abs(np.asarray(cmyk)[4, 4].astype(int) - (255, 0, 0)).max() < 8
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    moving = written(tmp_path / "m.gif", frames[0], save_all=True, append_images=frames[1:])
    assert open_image(moving).getpixel((3, 2)) == (255, 0, 0)
    assert open_image(written(tmp_path / "bits.png", Image.new("1", (3, 5), 1))).getpixel((1, 1)) == (255, 255, 255)
    assert open_image(written(tmp_path / "one.png", Image.new("RGB", (1, 1)))).size == (1, 1)
    assert open_image(written(tmp_path / "is_a_png.jpg", noise(), format="PNG")).size == (40, 20)


BAD: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("no image"),
    "zero bytes": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "pipe": lambda path: os.mkfifo(path),
    "bomb": huge_png,
    "PostScript": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_image_is_one_sentence(tmp_path: Path, case: str) -> None:
    path = tmp_path / "image.png"
    BAD[case](path)
    for look in (open_image, image_size):
        with pytest.raises(UserError, match=r"the image '.*image\.png' cannot be read: \S") as caught:
            look(path)
        assert "\n" not in str(caught.value)


def test_a_null_character_in_a_path_is_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        open_image("a\0.png")


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_files_never_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, tolerant: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # lmms-eval sets it for the whole process
    path = written(tmp_path / f"cut.{suffix}", noise(200, 150))
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="cannot be read"):
            open_image(path)
    assert tolerant is ImageFile.LOAD_TRUNCATED_IMAGES
    path.write_bytes(whole)
    assert open_image(path).size == (200, 150)


def test_a_header_is_enough_for_the_size(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", noise())
    path.write_bytes(path.read_bytes()[:60])
    assert image_size(path) == (40, 20)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "jp2", "ppm", "avif"])
def test_damaged_bytes_raise_nothing_but_one_sentence(tmp_path: Path, suffix: str) -> None:
    """Whatever bytes are changed, an image is opened or one sentence is said."""
    path = written(tmp_path / f"a.{suffix}", noise(24, 16))
    whole, dice = path.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(min(len(data), 400))] = dice.randrange(256)
        path.write_bytes(data)
        for look in (image_size, open_image):
            try:
                look(path)
            except UserError as error:
                assert "\n" not in str(error)
