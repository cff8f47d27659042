"""A student that is any Hugging Face vision-language model: which parts learn, and its latents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laavit.attention import AttentionContext
from laavit.backbones.base import Backbone
from laavit.backbones.chat import PromptSettings, SequenceBuilder
from laavit.backbones.loading import ATTENTIONS
from laavit.latents import NO_LATENTS, latent_tokens
from laavit.registry import STUDENTS, UserError, nearest
from laavit.structures import Batch

#: Names of parts that can be frozen, and the parameters they stand for.
PARTS = {
    "vision": r"(^|\.)(visual|vision_tower|vision_model)\.",
    "embeddings": r"(^|\.)embed_tokens\.",
    "head": r"(^|\.)lm_head\.",
    "decoder": r"(^|\.)language_model\.layers\.",
}


@STUDENTS.register_module()
class HFStudent(nn.Module):
    """A Hugging Face vision-language model to be trained.

    Args:
        path: folder, hub name or ``zoo:NAME``.
        dtype: of the weights; 'float32' with bf16 autocast is the safe choice for full fine-tuning.
        freeze: parts that do not learn: 'vision', 'embeddings' (latent rows still learn), 'head', 'decoder', or regular
            expressions over parameter names (``layers\\.[01]\\.`` freezes the first two layers).
        attention: of the text decoder: 'laavit', on SDPA, or 'laavit_flex', on FlexAttention: there a gate needs no
            mask, and training needs a GPU.
        min_pixels, max_pixels: images are scaled to lie between; None keeps the processor's own bound.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        freeze: Sequence[str] = ("vision",),
        attention: str = "laavit",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:  # another one would leave the gate and the targets' rows out
            raise UserError(f"attention: got '{attention}'; {nearest(attention, ATTENTIONS)}")
        backbone = Backbone.load(path, dtype, attention=attention, min_pixels=min_pixels, max_pixels=max_pixels)
        self._take(backbone, path, freeze)

    @classmethod
    def of(cls, backbone: Backbone, path: str, freeze: Sequence[str]) -> HFStudent:
        """A student around a backbone that is there already, for example one of shapes only (``laavit plan``)."""
        student = cls.__new__(cls)
        nn.Module.__init__(student)
        student._take(backbone, path, freeze)
        return student

    def _take(self, backbone: Backbone, path: str, freeze: Sequence[str]) -> None:
        self.path, self.freeze, self.layout = path, tuple(freeze), NO_LATENTS
        self.backbone, self.model = backbone, backbone.model

    def setup(self, latents: Any | None, generator: torch.Generator) -> None:
        """Add the latents' tokens and rows, then freeze what the recipe freezes.

        Raises:
            UserError: a name to freeze fits no parameter.
        """
        if latents is not None:
            latents.add_to(self.model, self.backbone.tokenizer, generator)
            self.layout = latents.layout
        names = [name for name, _ in self.model.named_parameters()]
        for part in self.freeze:
            try:
                pattern = re.compile(PARTS.get(part, part))
            except re.error as error:
                raise UserError(f"freeze: '{part}' is neither a part nor a regular expression ({error})") from None
            if part != "head" and not any(pattern.search(name) for name in names):  # a tied head has no parameter
                raise UserError(f"freeze: '{part}' fits no parameter of {self.path}; parts: {', '.join(PARTS)}")
            for name, parameter in self.model.named_parameters():
                if pattern.search(name):
                    parameter.requires_grad_(False)
        if self.latents and "embeddings" in self.freeze:
            self._keep_latent_rows_alive()

    def _keep_latent_rows_alive(self) -> None:
        """Frozen embeddings: only the latents' and the separator's rows get a gradient."""
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.tensor(self.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(self.latents)))
        keep = torch.zeros(weight.shape[0], 1, dtype=weight.dtype).index_fill_(0, ids, 1)
        weight.requires_grad_(True)
        weight.register_hook(lambda gradient: gradient * keep.to(gradient.device))

    @property
    def latents(self) -> int:
        """K, or the most latents where their number varies."""
        return self.layout.most

    def builder(self, prompt: PromptSettings) -> SequenceBuilder:
        return self.backbone.builder(prompt, self.layout)

    def forward(self, batch: Batch, context: AttentionContext | None = None) -> Tensor:
        """Hidden states [B, S, D]."""
        return self.backbone.forward(batch, context)
