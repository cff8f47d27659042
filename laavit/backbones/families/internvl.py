"""InternVL in transformers' own classes: a grid of tiles near the image's shape, then a thumbnail of all of it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from laavit.backbones.families.tiled import Region, Tiled
from laavit.registry import FAMILIES


@FAMILIES.register_module(name="internvl")
class InternVL(Tiled):
    """The image is stretched over ``rows`` x ``columns`` tiles; pixel shuffle merges patches by squares.

    Source: transformers' ``GotOcr2ImageProcessor.crop_image_to_patches`` (arXiv 2404.16821, dynamic resolution).
    """

    image_settings = ("crop_to_patches", "min_patches", "max_patches")

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        pixels, patch = int(config.vision_config.image_size[0]), int(config.vision_config.patch_size[0])
        self.merge = round(1 / config.downsample_ratio)
        self.side = pixels // patch // self.merge
        self.seen = self.side * self.merge * patch / pixels

    def regions(self, height: int, width: int) -> list[Region]:
        whole = (0.0, 0.0, 1.0, 1.0)
        if not self.setting("crop_to_patches"):
            return [whole]
        size = self.setting("size")
        columns, rows = get_optimal_tiled_canvas(
            (height, width), (size.height, size.width), self.setting("min_patches"), self.setting("max_patches")
        )
        tiles = [
            (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
            for row in range(rows)
            for column in range(columns)
        ]
        return tiles if len(tiles) == 1 else [*tiles, whole]
