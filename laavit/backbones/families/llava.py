"""LLaVA: one square of patches an image. LLaVA-1.5, and students composed of a tower and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from laavit.backbones.families.tiled import Region, Tiled
from laavit.registry import FAMILIES, UserError


@FAMILIES.register_module(name="llava")
class Llava(Tiled):
    """The image is scaled, and its centre cut out where the processor says so (LLaVA-1.5, arXiv 2310.03744).

    The model drops the tower's first token (the class token) and no other: registers stay, before the patches.
    """

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        vision = config.vision_config
        if not hasattr(processor, "num_additional_image_tokens"):  # Pixtral: images of any shape
            raise UserError(f"a LLaVA with a '{vision.model_type}' tower does not see images as one square of patches")
        pixels, patch = int(vision.image_size), int(vision.patch_size)
        self.side = pixels // patch
        self.seen = self.side * patch / pixels
        self.lead = processor.num_additional_image_tokens - (config.vision_feature_select_strategy == "default")

    def regions(self, height: int, width: int) -> list[Region]:
        images = self.processor.image_processor
        padded = bool(getattr(images, "do_pad", False))  # to a square, the image in its middle
        square = max(height, width)
        full = (square, square) if padded else (height, width)
        size, crop = images.size, images.crop_size
        short = size.shortest_edge
        scaled = [side * short / min(full) for side in full] if short else [size.height, size.width]
        kept = (crop.height, crop.width) if images.do_center_crop else scaled
        edges = []
        for own, whole, large, cut in zip((height, width), full, scaled, kept, strict=True):
            begin, margin = (large - cut) / 2, (whole - own) / 2
            edges.append([(at * whole / large - margin) / own for at in (begin, begin + cut)])
        (top, bottom), (left, right) = edges
        return [(left, top, right, bottom)]

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """[N_i, D] an image, registers included."""
        return tuple(model.model.get_image_features(vision["pixel_values"]).pooler_output)

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}
