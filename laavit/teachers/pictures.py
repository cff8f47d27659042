"""Pictures as a static encoder reads them: the whole image, scaled to whole patches, never cropped."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laavit.images import open_image
from laavit.registry import UserError, nearest
from laavit.structures import Sample

ASPECTS = ("squash", "keep")


@dataclass(frozen=True)
class Pictures:
    """A sample with its pictures as the encoder reads them: float32 [3, H_px, W_px] each."""

    sample: Sample
    pixels: tuple[Tensor, ...]


@dataclass(frozen=True)
class PicturePreparer:
    """Opens a sample's images and scales each as a whole; picklable, so that data workers can run it.

    Encoders were trained on crops; a crop would hide a part of the image from the gaze, so there is none here.

    Args:
        height, width: pixels, whole patches. patch: pixels of a patch, height and width.
        aspect: 'squash' every image to ``height`` x ``width``; or 'keep' its proportions, as nearly as whole patches
            allow, at no more patches than ``height`` x ``width`` holds (grids then differ between images).
        mean, std: of each colour. interpolation: Pillow's name of the filter.
    """

    height: int
    width: int
    patch: tuple[int, int]
    aspect: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS:
            raise UserError(f"teacher.aspect: got '{self.aspect}'; {nearest(self.aspect, ASPECTS)}")
        if self.height < self.patch[0] or self.width < self.patch[1]:
            raise UserError(f"teacher.size: {self.height} x {self.width} px is less than a patch of {self.patch}")
        if self.height % self.patch[0] or self.width % self.patch[1]:
            raise UserError(
                f"teacher.size: {self.height} x {self.width} px is no whole number of patches of "
                f"{self.patch[0]} x {self.patch[1]} px"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size in pixels."""
        rows, columns = self.height // self.patch[0], self.width // self.patch[1]
        if self.aspect == "squash":
            return rows, columns
        most = rows * columns
        ratio = (height / self.patch[0]) / (width / self.patch[1])  # rows to columns
        if ratio >= 1:
            columns = max(1, math.floor(math.sqrt(most / ratio)))
            return max(1, min(most // columns, round(columns * ratio))), columns
        rows = max(1, math.floor(math.sqrt(most * ratio)))
        return rows, max(1, min(most // rows, round(rows / ratio)))

    def __call__(self, sample: Sample) -> Pictures:
        """The pictures of one sample.

        Raises:
            UserError: the sample has no image, or one cannot be read.
        """
        if not sample.images:
            raise UserError(f"sample '{sample.id}' has no image, and a static encoder reads nothing else")
        return Pictures(sample, tuple(self.pixels(open_image(path)) for path in sample.images))

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB image, scaled and normalised: float32 [3, rows * patch height, columns * patch width]."""
        rows, columns = self.grid(image.height, image.width)
        size = (columns * self.patch[1], rows * self.patch[0])
        scaled = image.resize(size, Image.Resampling[self.interpolation.upper()])
        values = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def card(self) -> dict[str, Any]:
        """What a store's header says of it."""
        return asdict(self)
