"""From a teacher to traces (LaViT, Sec. 4.1): a greedy answer, then one pass that records gaze and semantics.

The second pass records the chosen rows alone (O(R * S), never S x S) and takes the last layer's states at the image
tokens. In a causal decoder with the image before the question those states cannot depend on the question; gaze-weighted
pooling, or the prompt order 'question_first', makes the semantics contextual. All of it is a setting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from laavit import __version__
from laavit.attention import AttentionContext
from laavit.backbones.base import collate
from laavit.backbones.chat import PromptSettings, SequenceBuilder
from laavit.backbones.rows import check_kinds, image_rows, row_positions
from laavit.registry import SETTINGS, UserError, nearest
from laavit.structures import Encoded, Role, Sample, Trace
from laavit.teachers.hf import HFTeacher
from laavit.traces.gaze import normalise, to_distribution, top_k
from laavit.traces.store import TraceWriter

logger = logging.getLogger(__name__)

POOLINGS = ("gaze_top_k", "gaze", "mean")
ANSWERS = ("teacher", "gold")


@SETTINGS.register_module(name="extract")
@dataclass(frozen=True)
class ExtractSettings:
    """What is read off a teacher.

    Args:
        rows: T of Eq. 2: kinds of text positions whose attention is averaged.
        layers: decoder layers averaged, negative ones from the end; None is all (Eq. 2).
        semantics: V_sem pooled over image tokens: 'gaze_top_k' (weighted by the strongest gaze), 'gaze' (by all of it)
            or 'mean'.
        top_k: how many tokens 'gaze_top_k' keeps (paper: 8).
        answer: whose words are read in the second pass: the 'teacher' answers greedily, or the 'gold' answer is given.
        prompt_order: 'image_first' or 'question_first'.
        system: the teacher's system prompt; an empty one leaves it to the chat template.
        max_new_tokens: the longest answer. repetition_penalty: of the greedy answer (the authors' code: 1.05).
        batch_size: samples a pass. shard_size: samples a shard of the store, a multiple of ``batch_size``.
        gaze_top_k: store only the k strongest tokens of a map; None stores the whole map.
    """

    rows: tuple[str, ...] = ("question", "header", "answer")
    layers: tuple[int, ...] | None = None
    semantics: str = "gaze_top_k"
    top_k: int = 8
    answer: str = "teacher"
    prompt_order: str = "image_first"
    system: str = ""
    max_new_tokens: int = 64
    repetition_penalty: float = 1.0
    batch_size: int = 8
    shard_size: int = 512
    gaze_top_k: int | None = None

    def __post_init__(self) -> None:
        check_kinds("extract.rows", tuple(self.rows))
        if self.semantics not in POOLINGS:
            raise UserError(f"extract.semantics: got '{self.semantics}'; {nearest(self.semantics, POOLINGS)}")
        if self.answer not in ANSWERS:
            raise UserError(f"extract.answer: got '{self.answer}'; {nearest(self.answer, ANSWERS)}")
        for name in ("top_k", "max_new_tokens", "batch_size", "shard_size", "gaze_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"extract.{name}: at least 1, got {value}")
        if self.shard_size % self.batch_size:
            raise UserError(
                f"extract.shard_size ({self.shard_size}) is no multiple of extract.batch_size ({self.batch_size}): "
                "a resumed extraction would cut other batches"
            )
        PromptSettings(order=self.prompt_order)


def store_header(teacher: HFTeacher, settings: ExtractSettings, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a store says about itself; a recipe whose settings differ from it is refused."""
    processor = teacher.backbone.processor
    return {
        "laavit": __version__,
        "teacher": teacher.path,
        "weights_sha256": teacher.backbone.weights_digest(),
        "processor": type(processor).__name__,
        "image_processor": processor.image_processor.to_json_string(),
        "chat_template": processor.chat_template,
        "width": teacher.backbone.width,
        "depth": teacher.backbone.depth,
        "gaze_top_k": settings.gaze_top_k,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()},
        "data": dict(data),
    }


@torch.no_grad()
def record(
    teacher: HFTeacher, encoded: Sequence[Encoded], answers: Sequence[str], settings: ExtractSettings
) -> list[Trace]:
    """One teacher-forced pass over answered samples: gaze (Eq. 2) and semantics of each.

    Args:
        encoded: samples with their answer (``SequenceBuilder.with_answer``). answers: the teacher's, for the trace.
    """
    backbone = teacher.backbone
    batch = collate(encoded, backbone.family, backbone.tokenizer.pad_token_id).to(backbone.device)
    index = torch.cat([row_positions(batch, kind) for kind in settings.rows], 1)
    context = AttentionContext(rows=index, layers=settings.layers, num_layers=backbone.depth, merged=True)
    hidden = backbone.forward(batch, context)
    rows, valid = image_rows(context.mean_rows(), batch.roles)  # [B, R, N], [B, N]
    real = (index >= 0).to(rows.dtype)
    scores = (rows * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)  # S_j of Eq. 2
    states = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).cpu()
    scores, valid, roles = scores.cpu(), valid.cpu(), batch.roles.cpu()
    traces = []
    for i, item in enumerate(encoded):
        gaze = scores[i][valid[i]]
        if not bool(torch.isfinite(gaze).all() and torch.isfinite(states[i][roles[i] == Role.IMAGE]).all()):
            raise UserError(
                f"the trace of sample '{item.sample.id}' is not finite: the teacher's weights are damaged, "
                f"or its numbers overflow in {hidden.dtype} (teacher.dtype)"
            )
        traces.append(
            Trace(
                sample_id=item.sample.id,
                answer=answers[i],
                tiles=tuple(span.tile for span in item.spans),
                gaze=gaze,
                semantics=pool(states[i][roles[i] == Role.IMAGE], gaze, settings),
                mass=float(gaze.sum()),
            )
        )
    return traces


def pool(states: Tensor, gaze: Tensor, settings: ExtractSettings) -> Tensor:
    """V_sem of one sample: image states [N, D] weighted by the gaze [N] (Eq. 3), or their mean -> [D]."""
    weights = normalise(gaze)
    if settings.semantics == "mean" or not bool(weights.any()):  # one token, or none looked at more than another
        return states.mean(0)
    if settings.semantics == "gaze_top_k":
        weights = top_k(weights, settings.top_k)
    return to_distribution(weights).to(states.dtype) @ states


class Extractor:
    """Answers and records batches of samples.

    Args:
        teacher: a frozen teacher. settings: what is read off it.
        latents: K of a model that was trained with latents (to look at a student), 0 for a plain one.
    """

    def __init__(self, teacher: HFTeacher, settings: ExtractSettings, latents: int = 0) -> None:
        self.teacher, self.settings = teacher, settings
        prompt = PromptSettings(system=settings.system, order=settings.prompt_order)
        self.builder: SequenceBuilder = teacher.backbone.builder(prompt, latents)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Trace]:
        """Traces of one batch; the vision tower runs once for the answer and the recording."""
        backbone, settings = self.teacher.backbone, self.settings
        prompts = [self.builder.prompt_of(sample) for sample in samples]
        vision = backbone.family.batch([prompt.vision for prompt in prompts])
        features = backbone.family.image_features(backbone.model, {k: v.to(backbone.device) for k, v in vision.items()})
        offset = 0
        for i, prompt in enumerate(prompts):
            own = features[offset : offset + len(prompt.spans)]
            offset += len(prompt.spans)
            prompts[i] = replace(prompt, features=torch.cat(own))
        if settings.answer == "gold":
            answers = [sample.answer for sample in samples]
        else:
            answers = backbone.generate(prompts, settings.max_new_tokens, settings.repetition_penalty)
        answered = [self.builder.with_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        return record(self.teacher, answered, answers, settings)


def extract(
    teacher: HFTeacher, samples: Sequence[Sample], settings: ExtractSettings, out: Path, data: Mapping[str, Any]
) -> Path:
    """Write the traces of all samples into a store, going on where an earlier run stopped.

    Args:
        samples: in a fixed order, which the shards follow. out: the store's folder.
        data: what the header says of the data.
    """
    writer = TraceWriter(out, store_header(teacher, settings, data), settings.shard_size)
    extractor = Extractor(teacher, settings)
    todo = [sample for sample in samples if sample.id not in writer.done]
    logger.info("%d of %d samples have a trace already", len(samples) - len(todo), len(samples))
    with writer:
        for batch in _progress(todo, settings.batch_size):
            # All of a batch or nothing: a rest would be batched differently when resumed, to other bits.
            writer.extend(extractor(batch))
    return out


def _progress(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("extracting", total=len(samples))
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            yield batch
            bar.advance(task, len(batch))
