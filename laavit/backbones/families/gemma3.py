"""Gemma 3: so many tokens an image, whatever its shape; with pan-and-scan, crops along its longer side beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor

from laavit.backbones.families.tiled import Region, Tiled
from laavit.registry import FAMILIES


@FAMILIES.register_module(name="gemma3")
class Gemma3(Tiled):
    """The image is stretched to a square, its patches are averaged by squares (arXiv 2503.19786).

    An image's tokens see each other in both directions: the model builds its masks from ``token_type_ids``. Some
    layers look back no further than a sliding window, so that late rows see nothing of an early image there.
    """

    image_settings = (
        "do_pan_and_scan",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_ratio_to_activate",
    )

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        pixels, patch = int(config.vision_config.image_size), int(config.vision_config.patch_size)
        self.side = int(config.mm_tokens_per_image**0.5)
        self.merge = pixels // patch // self.side
        self.seen = self.side * self.merge * patch / pixels

    def regions(self, height: int, width: int) -> list[Region]:
        found = [(0.0, 0.0, 1.0, 1.0)]
        if not self.setting("do_pan_and_scan"):
            return found
        image = torch.empty(3, height, width, device="meta")
        # Of the class, since an image processor that runs on PIL has none; it reads nothing but its arguments.
        crops = Gemma3ImageProcessor.pan_and_scan_batched(
            self.processor.image_processor, image, *(self.setting(name) for name in self.image_settings[1:])
        )
        begin = 0
        for crop in crops:  # they follow each other along one axis
            end = begin + crop.shape[-1 if width >= height else -2]
            if width >= height:
                found.append((begin / width, 0.0, end / width, 1.0))
            else:
                found.append((0.0, begin / height, 1.0, end / height))
            begin = end
        return found

    def masks(self, model: Any, input_ids: Tensor) -> Any:
        """The model's own, [B, 1, S, S] of each kind of layer."""
        return model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty(*input_ids.shape, 0, dtype=model.dtype, device=input_ids.device),
            attention_mask=None,
            past_key_values=None,
            position_ids=None,
            **self.text_inputs(input_ids),
        )

    def text_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (input_ids == self.image_token_id).int()}
