"""LLaVA-OneVision: a base tile of the whole image, then an unpadded high-resolution grid with a newline after each row.

Source: transformers' ``LlavaOnevisionModel.pack_image_features`` and the image processor ("anyres", arXiv 2408.03326).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from laavit.backbones.families.base import Family
from laavit.registry import FAMILIES
from laavit.structures import Span, Tile


@FAMILIES.register_module(name="llava_onevision")
class LlavaOnevision(Family):
    """One image: two spans, base tile and grid. Several images: one padded square each, one newline after it.

    Newlines carry the image token's id and the learned ``image_newline`` embedding; they are no cells of a span.
    Regions reach past the image (below 0, above 1) where tokens look at padding. Along a grid of several tiles the
    cells are taken as equal: the few pixels at a tile's end that its tower leaves out are spread over all cells.
    """

    vision_keys = ("pixel_values", "image_sizes", "batch_num_images")
    takes_features = True

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        vision = config.vision_config
        self.tile = int(vision.image_size)  # pixels of a tile's side
        self.side = self.tile // int(vision.patch_size)  # tokens of a tile's side
        self.unseen = self.tile - self.side * int(vision.patch_size)  # pixels past the last whole patch
        self.most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))  # tiles' worth of cells a grid may hold

    def spans(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> tuple[Span, ...]:
        positions = (input_ids == self.image_token_id).nonzero().flatten().tolist()
        sizes: list[list[int]] = vision["image_sizes"].tolist() if "image_sizes" in vision else []
        spans: list[Span] = []
        offset = 0
        for image, (height, width) in enumerate(sizes):
            start = positions[offset] if offset < len(positions) else 0
            base = Span(start, Tile(self.side, self.side, image, self._base(height, width, len(sizes) > 1)))
            spans.append(base)
            count = base.tile.cells
            if len(sizes) > 1:
                count += 1  # the newline
            else:
                grid = self._grid(height, width)
                if grid.cells:  # a hair's width of an image can lose all of its grid to unpadding
                    spans.append(Span(base.stop, grid, stride=grid.width + 1))
                count += grid.height * (grid.width + 1)
            offset += count
            if offset <= len(positions) and positions[offset - 1] != start + count - 1:
                raise ValueError(f"the tokens of image {image} are not contiguous")
        if offset != len(positions):
            raise ValueError(f"{len(positions)} image tokens in the sequence, {offset} for images of {sizes} pixels")
        return tuple(spans)

    def _base(self, height: int, width: int, padded: bool) -> tuple[float, float, float, float]:
        """The base tile's region: of the image itself, or of the square it is padded to."""
        seen = 1 - self.unseen / self.tile
        if not padded:
            return 0.0, 0.0, seen, seen
        square = max(height, width)
        left, top = (square - width) // 2, (square - height) // 2
        return -left / width, -top / height, (square * seen - left) / width, (square * seen - top) / height

    def _grid(self, height: int, width: int) -> Tile:
        """The high-resolution grid after unpadding, and after shrinking where it holds too many cells."""
        canvas = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        rows, columns = (side // self.tile * self.side for side in canvas)
        # The model's own unpadding, of a grid that holds each cell's number.
        kept = unpad_image(torch.arange(rows * columns).view(1, rows, columns), (height, width))[0]
        size = (int(kept.shape[0]), int(kept.shape[1]))
        if not kept.numel():
            return Tile(*size)
        first = divmod(int(kept[0, 0]), columns)
        image = torch.empty(3, height, width, device="meta")
        scaled = get_patch_output_size(image, canvas, ChannelDimension.FIRST)
        edges = []
        for axis, cells in enumerate((rows, columns)):
            pixels = (canvas[axis] - self.unseen) / cells
            paste = (canvas[axis] - scaled[axis]) // 2
            edges.append([(pixels * cell - paste) / scaled[axis] for cell in (first[axis], first[axis] + size[axis])])
        ratio = math.sqrt(size[0] * size[1] / (self.most * self.side**2))
        if ratio > 1.1:  # interpolated to fewer cells over the same region
            size = (int(size[0] // ratio), int(size[1] // ratio))
        (top, bottom), (left, right) = edges
        return Tile(*size, region=(left, top, right, bottom))

    def batch(self, vision: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Images with fewer tiles are padded with zeros, which the tower does not see."""
        most = max((item["pixel_values"].shape[1] for item in vision if "pixel_values" in item), default=0)
        filled = [
            {
                key: F.pad(value, (0, 0, 0, 0, 0, 0, 0, most - value.shape[1])) if key == "pixel_values" else value
                for key, value in item.items()
            }
            for item in vision
        ]
        return super().batch(filled)

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """[N_i, D] an image, newlines included."""
        output = model.model.get_image_features(
            vision["pixel_values"], vision["image_sizes"], batch_num_images=vision["batch_num_images"]
        )
        return tuple(output.pooler_output)

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.vision_tower

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model
