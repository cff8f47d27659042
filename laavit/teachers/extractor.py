"""The extractor of Hugging Face teachers: prompts made in data workers, answers and traces on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laavit.backbones.base import Backbone
from laavit.backbones.chat import PromptSettings, SequenceBuilder
from laavit.latents import LatentLayout
from laavit.registry import UserError
from laavit.structures import Encoded, Sample, Trace
from laavit.teachers.answering import answer_and_record
from laavit.teachers.blind import BlindReader
from laavit.teachers.logits import check_top_k
from laavit.teachers.recording import record, recording, state_layer
from laavit.teachers.settings import ExtractSettings
from laavit.traces.tagger import load_tagger


@dataclass(frozen=True)
class Prepared:
    """One sample as the teacher reads it.

    Args:
        prompt: its generation prompt. blind: the same without images, where the teacher answers without them too.
    """

    prompt: Encoded
    blind: Encoded | None = None


class HFPreparer:
    """Opens a sample's images and tokenises its words; picklable, without the model.

    Args:
        builder: makes prompts. blind: make one without the images as well.
    """

    def __init__(self, builder: SequenceBuilder, blind: bool = False) -> None:
        self.builder, self.blind = builder, blind

    def __call__(self, sample: Sample) -> Prepared:
        """Raises: UserError: no image, a broken one, or words that cannot be put into the chat."""
        if not sample.images:
            raise UserError(f"sample '{sample.id}' has no image to look at")
        without = self.builder.prompt_of(replace(sample, images=())) if self.blind else None
        return Prepared(self.builder.prompt_of(sample), without)


class HFExtractor:
    """Answers and records batches of prepared samples.

    Args:
        backbone: a frozen model. settings: what is read off it.
        latents: of a model that was trained with some (to look at a student), K or their layout; 0 for a plain one.

    Raises:
        UserError: the model has no such layer or head, or fewer tokens than are to be kept; the tagger or the text-only
            model cannot be loaded.
    """

    def __init__(self, backbone: Backbone, settings: ExtractSettings, latents: int | LatentLayout = 0) -> None:
        self.backbone, self.settings = backbone, settings
        prompt = PromptSettings(system=settings.system, order=settings.prompt_order)
        self.preparer = HFPreparer(backbone.builder(prompt, latents), settings.blind == "teacher")
        recording(backbone, settings, torch.empty(1, 0, dtype=torch.long))  # these raise before the first batch
        state_layer(backbone, settings.semantics_layer)
        check_top_k(backbone, settings.logits)
        self.tagger = load_tagger(settings.tagger) if settings.tagger and settings.steps != "none" else None
        self.reader: BlindReader | None = None
        if settings.blind not in (None, "teacher"):
            dtype = next(backbone.model.parameters()).dtype
            self.reader = BlindReader(str(settings.blind), settings, dtype, backbone.device)

    @torch.no_grad()
    def __call__(self, prepared: Sequence[Prepared]) -> list[Trace]:
        """Traces of one batch; the vision tower runs once for the answer and the recording, where the family can."""
        if self.settings.answer == "teacher" and self.settings.passes == 1:
            prompts, builder = [item.prompt for item in prepared], self.preparer.builder
            return answer_and_record(self.backbone, builder, prompts, self.settings, self.tagger, self._blind(prepared))
        answered, answers = self.answered(prepared)
        return record(self.backbone, answered, answers, self.settings, self.tagger, self._blind(prepared))

    @torch.no_grad()
    def answered(self, prepared: Sequence[Prepared]) -> tuple[list[Encoded], list[str]]:
        """The samples with the answers that are read in the recording pass, and the answers."""
        prompts = self._seen([item.prompt for item in prepared])
        gold = self.settings.answer == "gold"
        answers = [prompt.sample.answer for prompt in prompts] if gold else self._answers(prompts)
        builder = self.preparer.builder
        return [builder.with_answer(p, a) for p, a in zip(prompts, answers, strict=True)], answers

    def _answers(self, prompts: Sequence[Encoded]) -> list[str]:
        return self.backbone.generate(prompts, self.settings.max_new_tokens, self.settings.repetition_penalty)

    def _blind(self, prepared: Sequence[Prepared]) -> list[str] | None:
        """What is answered without the images; None where nobody is asked."""
        if self.reader is not None:
            return self.reader([item.prompt.sample for item in prepared])
        prompts = [item.blind for item in prepared if item.blind is not None]
        return self._answers(prompts) if prompts else None

    def _seen(self, prompts: Sequence[Encoded]) -> list[Encoded]:
        """The prompts with their images' features in place of pixels, one run of the vision tower for all."""
        family = self.backbone.family
        if not family.takes_features:
            return list(prompts)
        vision = family.batch([prompt.vision for prompt in prompts])
        vision = {key: value.to(self.backbone.device) for key, value in vision.items()}
        features: Sequence[Tensor] = family.image_features(self.backbone.model, vision)
        seen, offset = [], 0
        for prompt in prompts:
            own = features[offset : offset + len(prompt.sample.images)]
            offset += len(own)
            # The pixels have done their work; kept, they would be copied into every batch that follows.
            rest = {key: value for key, value in prompt.vision.items() if not key.startswith("pixel_")}
            seen.append(replace(prompt, features=torch.cat(list(own)), vision=rest))
        return seen
