"""A student that is any Hugging Face vision-language model: which parts learn, and its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from laavit.attention import AttentionContext
from laavit.backbones.base import Backbone
from laavit.backbones.chat import PromptSettings, SequenceBuilder
from laavit.backbones.loading import below, check_attention_name, check_shapes
from laavit.latents import NO_LATENTS, check_attention, latent_tokens
from laavit.registry import STUDENTS, UserError
from laavit.structures import Batch
from laavit.students.freezing import freeze as freeze_parts
from laavit.students.freezing import keep_rows_alive, parameters_of, tables
from laavit.students.lora import Adapters, LoraSettings, base_of


@STUDENTS.register_module()
class HFStudent(nn.Module):
    """A Hugging Face vision-language model to be trained.

    Args:
        path: folder, hub name or ``zoo:NAME``.
        dtype: of the weights; 'float32' with bf16 autocast is the safe choice for full fine-tuning.
        freeze: parts that do not learn: 'vision', 'tower', 'projector', 'embeddings', 'head', 'decoder'
            (docs/students.md says what each is), or regular expressions over parameter names (``layers\\.[01]\\.``: the
            first two layers). The latents' rows of frozen embeddings and of a frozen head learn all the same.
        attention: of the text decoder: 'laavit', on SDPA, or 'laavit_flex', on FlexAttention: there a gate needs no
            mask, and training needs a GPU.
        min_pixels, max_pixels: images are scaled to lie between; None keeps the processor's own bound.
        lora: adapters in place of the language model's own weights, see ``LoraSettings``; None trains the weights.
    """

    adapters: Adapters | None = None
    base_sha256: str | None = None

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        freeze: Sequence[str] = ("vision",),
        attention: str = "laavit",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        lora = LoraSettings(**lora) if isinstance(lora, Mapping) else lora
        check_attention_name(attention)  # another one would leave the gate and the targets' rows out
        backbone = Backbone.load(path, dtype, attention=attention, min_pixels=min_pixels, max_pixels=max_pixels)
        self._take(backbone, path, freeze, lora)
        if lora is not None:  # before latents change them
            self.base_sha256 = backbone.weights_digest()

    @classmethod
    def of(cls, backbone: Backbone, path: str, freeze: Sequence[str], lora: LoraSettings | None = None) -> HFStudent:
        """A student around a backbone that is there already, for example one of shapes only (``laavit plan``)."""
        student = cls.__new__(cls)
        nn.Module.__init__(student)
        student._take(backbone, path, freeze, lora)
        return student

    def _take(self, backbone: Backbone, path: str, freeze: Sequence[str], lora: LoraSettings | None) -> None:
        self.path, self.freeze, self.layout = path, tuple(freeze), NO_LATENTS
        self.backbone, self.model = backbone, backbone.model
        self.lora = lora

    def setup(self, latents: Any | None, generator: torch.Generator) -> None:
        """Add the latents' tokens and rows, freeze what the recipe freezes, then add adapters.

        Raises:
            UserError: a name to freeze fits no parameter, one of adapters' targets no linear layer, or the attention
                function cannot train these latents.
        """
        if latents is not None:
            check_attention(latents.layout, self.backbone.attention)
            latents.add_to(self.model, self.backbone.tokenizer, generator)
            self.layout = latents.layout
        self.backbone.layout = self.layout
        freeze_parts(self.backbone, self.freeze, self.path)
        rows = self.backbone.tokenizer.convert_tokens_to_ids(latent_tokens(self.latents))
        if self.lora is not None:
            self.adapters = Adapters(self.backbone, self.lora, rows, generator, self.path, self.base_sha256)
        elif rows:
            for table in tables(self.backbone).values():
                if not table.requires_grad:
                    keep_rows_alive(table, rows)

    def learns(self, part: str) -> bool:
        """Whether anything of a part (``laavit.students.freezing.PARTS``) learns, adapters in it included."""
        return any(parameter.requires_grad for parameter in parameters_of(part, self.backbone))

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a plain Hugging Face folder; with adapters: what was trained alone, and which base it belongs to.

        Args:
            state: this student's ``state_dict`` of another moment; its own where it is left out.
        """
        weights = None if state is None else below(state, "model.")
        if self.adapters is None:
            self.backbone.save(folder, weights)
        else:
            self.adapters.save(folder, weights)
            self.backbone.processor.save_pretrained(folder)

    def save_processor(self, folder: Path) -> None:
        """Write what ``save`` does, without tensors: processor and configuration; of adapters, their base."""
        self.backbone.processor.save_pretrained(folder)
        self.model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        if self.adapters is not None:
            self.adapters.save_base(folder)

    def saved_bytes(self) -> int:
        """About what the tensors that ``save`` writes take."""
        kept = [p for p in self.model.parameters() if self.adapters is None or p.requires_grad]
        return sum(parameter.numel() * parameter.element_size() for parameter in kept)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, into a student that is set up by the same recipe.

        Raises:
            UserError: a file is missing, it holds other parameters, or its adapters belong to another base.
        """
        if bool(base_of(folder)) != (self.adapters is not None):
            found, own = ("adapters", "none") if self.adapters is None else ("whole weights", "adapters (lora)")
            raise UserError(f"the checkpoint {folder} holds {found}, and this student has {own}")
        if self.adapters is not None:
            self.adapters.load(folder)
            return
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=next(self.model.parameters()).dtype)
        check_shapes(folder, self.model.state_dict(), loaded.state_dict())
        self.model.load_state_dict(loaded.state_dict())

    def merge(self) -> None:
        """Make adapters part of the weights: afterwards ``save`` writes a plain Hugging Face folder."""
        if self.adapters is not None:
            self.adapters.merge()
            self.adapters = None

    @property
    def latents(self) -> int:
        """K, or the most latents where their number varies."""
        return self.layout.most

    def builder(self, prompt: PromptSettings) -> SequenceBuilder:
        return self.backbone.builder(prompt, self.layout)

    def forward(self, batch: Batch, context: AttentionContext | None = None) -> Tensor:
        """Hidden states [B, S, D]."""
        return self.backbone.forward(batch, context)
