"""Where the image is: the one place that knows a model family's geometry, one file a family.

A family turns the processor's output into spans, positions and features. Boxes, gaze, gates and plots use
spans only. Registered under the Hugging Face ``model_type``.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from laavit.backbones.families.base import Family
from laavit.backbones.families.gemma3 import Gemma3
from laavit.backbones.families.idefics import Idefics
from laavit.backbones.families.internvl import InternVL
from laavit.backbones.families.llava import Llava
from laavit.backbones.families.llava_onevision import LlavaOnevision
from laavit.backbones.families.qwen import Qwen3VL, QwenVL
from laavit.registry import FAMILIES, UserError, nearest

__all__ = [
    "Family",
    "Gemma3",
    "Idefics",
    "InternVL",
    "Llava",
    "LlavaOnevision",
    "Qwen3VL",
    "QwenVL",
    "family_class",
    "family_of",
]


def family_class(model_type: str) -> type[Family]:
    """The family registered for a ``model_type``.

    Raises:
        UserError: laavit does not know where this family keeps its image tokens.
    """
    kind = FAMILIES.get(model_type)
    if kind is None:
        raise UserError(
            f"the model is of type '{model_type}', and laavit does not know where it keeps its image tokens; "
            f"{nearest(model_type, FAMILIES.module_dict)}"
        )
    return kind


def family_of(config: PreTrainedConfig, processor: Any) -> Family:
    """The family of a model's configuration.

    Raises:
        UserError: laavit does not know it.
    """
    return family_class(config.model_type)(config, processor)
