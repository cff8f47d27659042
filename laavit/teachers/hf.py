"""A teacher that is any Hugging Face vision-language model; frozen and pinned to eval here, and nowhere else."""

from __future__ import annotations

from typing import Any

from torch import cuda

from laavit.backbones.base import Backbone
from laavit.latents import LatentLayout
from laavit.registry import TEACHERS
from laavit.teachers.extractor import HFExtractor
from laavit.teachers.logits import vocabulary_digest
from laavit.teachers.settings import ExtractSettings


@TEACHERS.register_module()
class HFTeacher:
    """A frozen Hugging Face vision-language model.

    Args:
        path: folder, hub name or ``zoo:NAME``.
        dtype: of the weights.
        device: 'auto' takes a GPU where there is one.
        min_pixels, max_pixels: images are scaled to lie between; None keeps the processor's own bound.
        device_map: spreads the model over devices ('auto', or module -> device), in place of ``device``.
        quantization: '8bit', '4bit', or arguments of transformers' ``BitsAndBytesConfig``.
        images: how images are cut up, as far as the family lets it be changed (InternVL: max_patches; Gemma 3:
            do_pan_and_scan).
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        device: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantization: str | dict[str, Any] | None = None,
        images: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.quantization = path, quantization
        place = ("cuda" if cuda.is_available() else "cpu") if device == "auto" else device
        self.backbone = Backbone.load(
            path,
            dtype,
            place,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            device_map=device_map,
            quantization=quantization,
            images=images,
        )
        self.backbone.model.eval().requires_grad_(False)

    def card(self) -> dict[str, Any]:
        """What a store's header says of the teacher."""
        processor = self.backbone.processor
        return {
            "teacher": self.path,
            "dtype": str(self.backbone.model.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "weights_sha256": self.backbone.weights_digest(),
            "processor": type(processor).__name__,
            "image_processor": processor.image_processor.to_json_string(),
            "chat_template": processor.chat_template,
            "tokenizer_sha256": vocabulary_digest(processor.tokenizer),
            "width": self.backbone.width,
            "depth": self.backbone.depth,
        }

    def extractor(self, settings: ExtractSettings, latents: int | LatentLayout = 0) -> HFExtractor:
        """Reads traces by these settings.

        Args:
            latents: of a model that was trained with some (to look at a student), K or their layout; 0 for a plain one.
        """
        return HFExtractor(self.backbone, settings, latents)
