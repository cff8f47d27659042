"""A student put together of a vision tower and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from laavit.backbones.base import Backbone
from laavit.backbones.compose import compose, open_language
from laavit.backbones.loading import check_attention_name, dtype_of
from laavit.backbones.towers import open_tower
from laavit.registry import STUDENTS
from laavit.students.hf import HFStudent
from laavit.students.lora import LoraSettings


@STUDENTS.register_module()
class ComposedStudent(HFStudent):
    """A vision tower, a new projector (two linear layers) and a causal language model, as a stock LLaVA.

    Its checkpoints and exports are folders of ``LlavaForConditionalGeneration``: any that was trained before opens as
    an ``HFStudent``, too.

    Args:
        tower: 'timm:NAME', 'open_clip:MODEL/WEIGHTS', or a folder or hub name in transformers' format.
        language: folder, hub name or ``zoo:NAME`` of a causal language model that has a chat template.
        image_size: pixels of a side that images are scaled to; None is the tower's own.
        layer: of the tower, whose states the projector reads; -1 is the last, before its norm.
        projector: activation between its layers.
        pretrained: start the tower from trained weights; False starts it from random ones.
        weights: a local .safetensors file of the tower, in place of the hub's (timm, open_clip).
        options: further arguments of timm's or open_clip's ``create_model``.
        seed: of what starts random.
        dtype, freeze, attention, lora: as of ``HFStudent``.
    """

    def __init__(
        self,
        tower: str,
        language: str,
        image_size: int | None = None,
        layer: int = -2,
        projector: str = "gelu",
        pretrained: bool = True,
        weights: str | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        dtype: str = "float32",
        freeze: Sequence[str] = ("vision",),
        attention: str = "laavit",
        lora: LoraSettings | None = None,
    ) -> None:
        nn.Module.__init__(self)
        lora = LoraSettings(**lora) if isinstance(lora, Mapping) else lora
        check_attention_name(attention)  # another one would leave the gate and the targets' rows out
        kind = dtype_of(dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            eyes = open_tower(tower, weights, pretrained, image_size, options)
            model, processor = compose(eyes, *open_language(language, kind), layer, projector)
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        backbone = Backbone(model, processor)
        self._take(backbone, f"{tower} + {language}", freeze, lora)
        if lora is not None:  # before latents change them
            self.base_sha256 = backbone.weights_digest()
