"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, patches merged by squares, M-RoPE; Qwen3-VL with DeepStack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from laavit.backbones.families.base import Family
from laavit.registry import FAMILIES
from laavit.structures import Span, Tile


@FAMILIES.register_module(name="qwen2_5_vl")
class QwenVL(Family):
    """One span an image: h * w patches merged by ``spatial_merge_size`` squared; M-RoPE."""

    #: the processor's outputs that the vision tower reads
    vision_keys = ("pixel_values", "image_grid_thw")
    takes_features = True

    def __init__(self, config: PreTrainedConfig, processor: Any) -> None:
        super().__init__(config, processor)
        self.merge = int(config.vision_config.spatial_merge_size)
        # get_rope_index reads the configuration only; a one-layer copy without storage serves data workers.
        small = copy.deepcopy(config)
        small.text_config.num_hidden_layers = 1
        if getattr(small.text_config, "layer_types", None):
            small.text_config.layer_types = small.text_config.layer_types[:1]
        small.vision_config.depth = 1
        with torch.device("meta"):
            self._geometry = AutoModel.from_config(small)

    def spans(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> tuple[Span, ...]:
        """Image tokens of one sequence [S] as one Span an image.

        Raises:
            ValueError: the number of image tokens differs from what the grids say.
        """
        positions = (input_ids == self.image_token_id).nonzero().flatten().tolist()
        grids = vision["image_grid_thw"].tolist() if "image_grid_thw" in vision else []
        expected = sum(t * h * w // self.merge**2 for t, h, w in grids)
        if len(positions) != expected:
            raise ValueError(f"{len(positions)} image tokens in the sequence, {expected} in the image grids {grids}")
        spans, offset = [], 0
        for index, (_, height, width) in enumerate(grids):
            span = Span(positions[offset], Tile(height // self.merge, width // self.merge, index))
            offset += span.tile.cells
            if positions[offset - 1] != span.stop - 1:
                raise ValueError(f"the tokens of image {index} are not contiguous")
            spans.append(span)
        return tuple(spans)

    def positions(self, input_ids: Tensor, vision: Mapping[str, Tensor]) -> Tensor:
        """M-RoPE positions of one sequence: long [3, S]."""
        types = (input_ids == self.image_token_id).int()
        positions, _ = self._geometry.get_rope_index(
            input_ids[None], mm_token_type_ids=types[None], image_grid_thw=vision.get("image_grid_thw")
        )
        return positions[:, 0]

    def text_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token_id).int()}

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the language model reads in place of the image tokens: [N_i, D] an image."""
        return tuple(model.model.get_image_features(vision["pixel_values"], vision["image_grid_thw"]).pooler_output)

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Forward arguments that hand over cached features in place of pixels."""
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))}}

    def vision_tower(self, model: Any) -> nn.Module:
        return model.model.visual

    def projector(self, model: Any) -> list[nn.Module | nn.Parameter]:
        """The mergers, which are part of the tower."""
        visual = model.model.visual
        return [visual.merger, *getattr(visual, "deepstack_merger_list", ())]

    def decoder(self, model: Any) -> nn.Module:
        return model.model.language_model


FAMILIES.register_module(name="qwen2_vl", module=QwenVL)


@FAMILIES.register_module(name="qwen3_vl")
class Qwen3VL(QwenVL):
    """Qwen3-VL: the first decoder layers, too, read image features (DeepStack, arXiv 2406.04334).

    Features handed over are [N, (1 + J) * D]: what stands at the image tokens, then what each of the first J layers
    adds to it.
    """

    def image_features(self, model: Any, vision: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        output = model.model.get_image_features(vision["pixel_values"], vision["image_grid_thw"])
        levels = zip(output.pooler_output, *output.deepstack_features, strict=True)  # one entry an image
        return tuple(torch.cat(level, dim=-1) for level in levels)

    def feature_inputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        width = self.config.get_text_config().hidden_size
        levels = [list(level) for level in zip(*(f.split(width, dim=-1) for f in features), strict=True)]
        output = BaseModelOutputWithDeepstackFeatures(pooler_output=levels[0], deepstack_features=levels[1:])
        return {"mm_encoder_outputs": {"image": output}}


FAMILIES.register_module(name="qwen3_vl_moe", module=Qwen3VL)
