"""What families share that cut an image into square tiles of equally many tokens: InternVL and Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from laavit.backbones.families.base import Family
from laavit.structures import Span, Tile

Region = tuple[float, float, float, float]


class Tiled(Family):
    """A run of ``side`` x ``side`` tokens a tile; a subclass says which tiles an image is cut into.

    The processors tell no image's size, and how it was cut depends on it: ``image_sizes`` is kept beside the pixels.
    """

    vision_keys = ("pixel_values", "image_sizes")
    geometry_keys = ("image_sizes",)
    takes_features = True
    #: tokens along each side of a tile
    side: int
    #: tokens of a tile before its patches (registers of its tower)
    lead: int = 0
    #: the share of a tile's side that its tokens cover; the tower leaves out pixels past the last whole patch
    seen: float

    def regions(self, height: int, width: int) -> list[Region]:
        """The parts of an image of so many pixels that its tiles show, in the order of their tokens."""
        raise TypeError(f"{type(self).__name__} must define regions(height, width)")

    def setting(self, name: str) -> Any:
        """A setting of the image processor as a call of the processor applies it: the processor's own defaults win."""
        own = getattr(self.processor, "images_kwargs", {})
        return own[name] if name in own else getattr(self.processor.image_processor, name)

    def vision(self, output: Mapping[str, Any], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        if not images:
            return {}
        sizes = torch.tensor([[image.height, image.width] for image in images])
        return {"pixel_values": output["pixel_values"], "image_sizes": sizes}

    def spans(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> tuple[Span, ...]:
        positions = (input_ids == self.image_token_id).nonzero().flatten().tolist()
        sizes: list[list[int]] = vision["image_sizes"].tolist() if "image_sizes" in vision else []
        tiles = [
            Tile(self.side, self.side, image, self._covered(region))
            for image, size in enumerate(sizes)
            for region in self.regions(*size)
        ]
        count = self.lead + self.side**2
        if len(positions) != len(tiles) * count:
            raise ValueError(
                f"{len(positions)} image tokens in the sequence, {len(tiles)} tiles of {self.side} x {self.side} for "
                f"images of {sizes} pixels"
            )
        starts = positions[::count]
        if positions != [start + i for start in starts for i in range(count)]:
            raise ValueError("the tokens of a tile are not contiguous")
        return tuple(Span(start + self.lead, tile, lead=self.lead) for start, tile in zip(starts, tiles, strict=True))

    def _covered(self, region: Region) -> Region:
        left, top, right, bottom = region
        return left, top, left + (right - left) * self.seen, top + (bottom - top) * self.seen

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """[N_i, D] an image, its tiles one after the other."""
        features: Tensor = model.model.get_image_features(vision["pixel_values"]).pooler_output  # [tiles, side^2, D]
        counts = [len(self.regions(*size)) for size in vision["image_sizes"].tolist()]
        return tuple(part.flatten(0, 1) for part in features.split(counts))

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=torch.cat(list(features)))}}

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.vision_tower

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model
