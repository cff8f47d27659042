"""From a teacher to traces (LaViT, Sec. 4.1): a greedy answer, then one pass that records gaze and semantics.

The second pass records the chosen rows alone (O(R * S), never S x S) and takes the last layer's states at the image
tokens. In a causal decoder with the image before the question those states cannot depend on the question; gaze-weighted
pooling, or the prompt order 'question_first', makes the semantics contextual. All of it is a setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laavit.attention import AttentionContext
from laavit.backbones.base import Backbone, collate
from laavit.backbones.chat import PromptSettings, SequenceBuilder
from laavit.backbones.rows import image_rows, row_positions
from laavit.registry import UserError
from laavit.structures import Encoded, Role, Sample, Trace
from laavit.teachers.settings import ExtractSettings
from laavit.traces.semantics import select


@torch.no_grad()
def record(
    backbone: Backbone, encoded: Sequence[Encoded], answers: Sequence[str], settings: ExtractSettings
) -> list[Trace]:
    """One teacher-forced pass over answered samples: gaze (Eq. 2) and semantics of each.

    Args:
        encoded: samples with their answer (``SequenceBuilder.with_answer``). answers: the teacher's, for the trace.
    """
    batch = collate(encoded, backbone.family, backbone.tokenizer.pad_token_id).to(backbone.device)
    index = torch.cat([row_positions(batch, kind) for kind in settings.rows], 1)
    context = AttentionContext(rows=index, layers=settings.depths(backbone.depth), merged=True)
    hidden = backbone.forward(batch, context)
    rows, valid = image_rows(context.mean_rows(), batch.roles)  # [B, R, N], [B, N]
    real = (index >= 0).to(rows.dtype)
    scores = (rows * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)  # S_j of Eq. 2
    states = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).cpu()
    scores, valid, roles = scores.cpu(), valid.cpu(), batch.roles.cpu()
    traces = []
    for i, item in enumerate(encoded):
        gaze, own = scores[i][valid[i]], states[i][roles[i] == Role.IMAGE]
        if not bool(torch.isfinite(gaze).all() and torch.isfinite(own).all()):
            raise UserError(
                f"the trace of sample '{item.sample.id}' is not finite: the teacher's weights are damaged, "
                f"or its numbers overflow in {hidden.dtype} (teacher.dtype)"
            )
        semantics, tokens = select(own, gaze, settings.semantics, settings.top_k)
        traces.append(
            Trace(
                sample_id=item.sample.id,
                answer=answers[i],
                tiles=tuple(span.tile for span in item.spans),
                gaze=gaze,
                semantics=semantics,
                mass=float(gaze.sum()),
                semantic_tokens=tokens,
            )
        )
    return traces


class HFPreparer:
    """A sample as a generation prompt: its images opened, its words tokenised. Picklable, without the model."""

    def __init__(self, builder: SequenceBuilder) -> None:
        self.builder = builder

    def __call__(self, sample: Sample) -> Encoded:
        """Raises: UserError: an image is broken, or the words cannot be put into the chat."""
        return self.builder.prompt_of(sample)


class HFExtractor:
    """Answers and records batches of prepared samples.

    Args:
        backbone: a frozen model. settings: what is read off it.
        latents: K of a model that was trained with latents (to look at a student), 0 for a plain one.
    """

    def __init__(self, backbone: Backbone, settings: ExtractSettings, latents: int = 0) -> None:
        self.backbone, self.settings = backbone, settings
        prompt = PromptSettings(system=settings.system, order=settings.prompt_order)
        self.preparer = HFPreparer(backbone.builder(prompt, latents))

    @torch.no_grad()
    def __call__(self, prepared: Sequence[Encoded]) -> list[Trace]:
        """Traces of one batch; the vision tower runs once for the answer and the recording, where the family can."""
        backbone, settings = self.backbone, self.settings
        prompts = self._seen(prepared)
        if settings.answer == "gold":
            answers = [prompt.sample.answer for prompt in prompts]
        else:
            answers = backbone.generate(prompts, settings.max_new_tokens, settings.repetition_penalty)
        builder = self.preparer.builder
        answered = [builder.with_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        return record(backbone, answered, answers, settings)

    def _seen(self, prompts: Sequence[Encoded]) -> list[Encoded]:
        """The prompts with their images' features in place of pixels, one run of the vision tower for all."""
        family = self.backbone.family
        if not family.takes_features or not any(prompt.spans for prompt in prompts):
            return list(prompts)
        vision = family.batch([prompt.vision for prompt in prompts])
        vision = {key: value.to(self.backbone.device) for key, value in vision.items()}
        features: Sequence[Tensor] = family.image_features(self.backbone.model, vision)
        seen, offset = [], 0
        for prompt in prompts:
            own = features[offset : offset + len(prompt.sample.images)]
            offset += len(own)
            seen.append(replace(prompt, features=torch.cat(list(own))))
        return seen
