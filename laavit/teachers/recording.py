"""From a teacher to traces (LaViT, Sec. 4.1): an answer, and a pass that records gaze and semantics.

The pass records the chosen rows alone (O(R * S), never S x S) and takes a layer's states at the image tokens. It is a
pass over prompt and answer here; ``laavit.teachers.answering`` records the same while the answer is generated.
In a causal decoder with the image before the question those states cannot depend on the question; gaze-weighted
pooling, or the prompt order 'question_first', makes the semantics contextual. All of it is a setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laavit.attention import AttentionContext
from laavit.backbones.base import Backbone, collate
from laavit.backbones.rows import emits, image_rows, positions, row_positions
from laavit.registry import UserError
from laavit.structures import Batch, Encoded, Role, Step, Trace
from laavit.teachers.base import SampleError
from laavit.teachers.logits import answer_logits, predicting
from laavit.teachers.settings import ExtractSettings
from laavit.teachers.steps import Steps, split_answer, step_maps, token_offsets
from laavit.traces.gaze import normalise, to_distribution
from laavit.traces.semantics import select
from laavit.traces.tagger import Tagger


@dataclass(frozen=True)
class Asked:
    """Which rows of answered samples are recorded.

    Args:
        batch: the samples with their answers, right-padded. answers: as text.
        index: long [B, R], positions of the rows: of the kinds in ``extract.rows``, then of the steps' tokens; -1 pads.
        kinds: how many of the R are of the kinds. steps: of each sample; empty without steps.
    """

    encoded: Sequence[Encoded]
    answers: Sequence[str]
    batch: Batch
    index: Tensor
    kinds: int
    steps: list[Steps]


def asked(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    answers: Sequence[str],
    settings: ExtractSettings,
    tagger: Tagger | None = None,
) -> Asked:
    """Rows to record of samples with their answers (``SequenceBuilder.with_answer``), and the same answers as text."""
    batch = collate(encoded, backbone.family, backbone.tokenizer.pad_token_id).to(backbone.device)
    index = torch.cat([row_positions(batch, kind) for kind in settings.rows], 1)
    kinds = index.shape[1]
    steps: list[Steps] = []
    if settings.steps != "none":
        frame = backbone.family.answer_frame[0]
        offsets = [token_offsets(backbone.tokenizer, answer, frame) for answer in answers]
        steps = [split_answer(a, o, settings.steps, tagger) for a, o in zip(answers, offsets, strict=True)]
        index = torch.cat([index, answer_rows(encoded, steps, settings.step_rows).to(index)], 1)
    return Asked(encoded, answers, batch, index, kinds, steps)


@torch.no_grad()
def record(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    answers: Sequence[str],
    settings: ExtractSettings,
    tagger: Tagger | None = None,
    blind: Sequence[str] | None = None,
) -> list[Trace]:
    """One teacher-forced pass over answered samples: gaze (Eq. 2), semantics and steps of each.

    Where the answers are the gold ones, what the teacher expects along them is read in the same pass.

    Args:
        encoded: samples with their answer (``SequenceBuilder.with_answer``). answers: the same answers as text.
        tagger: names the groups of the steps. blind: what was answered without the image.

    Raises:
        SampleError: a trace is not finite, or none of a sample's recorded rows sees its image.
    """
    found = asked(backbone, encoded, answers, settings, tagger)
    context = recording(backbone, settings, found.index)
    with layer_states(backbone, settings.semantics_layer) as kept:
        hidden = backbone.forward(found.batch, context)
    rows, valid = image_rows(context.mean_rows(), found.batch.roles)  # [B, R, N], [B, N]
    states = image_states(kept[0] if kept else hidden, found.batch.roles)  # [B, N, D]
    traces = traces_of(found, rows, valid, states, settings, hidden.dtype, blind)
    if not settings.logits or settings.answer != "gold":
        return traces
    logits = answer_logits(backbone, predicting(hidden, encoded), encoded, settings.logits)
    return [replace(trace, logits=each) for trace, each in zip(traces, logits, strict=True)]


def traces_of(
    found: Asked,
    rows: Tensor,
    valid: Tensor,
    states: Tensor,
    settings: ExtractSettings,
    dtype: torch.dtype,
    blind: Sequence[str] | None = None,
) -> list[Trace]:
    """What was recorded as traces.

    Args:
        rows: [B, R, N], attention of the rows in ``found.index``, a mean over layers and heads. valid: bool [B, N].
        states: [B, N, D], on the CPU. dtype: the teacher's.

    Raises:
        SampleError: a trace is not finite, or none of a sample's recorded rows sees its image.
    """
    count, steps = found.kinds, found.steps
    if settings.normalisation == "rows":
        rows, raw = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny), rows
    else:
        raw = rows
    real = (found.index[:, :count] >= 0).to(rows.dtype)

    def mean(rows: Tensor) -> Tensor:
        """S_j of Eq. 2: [B, N]."""
        return ((rows[:, :count] * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)).cpu()

    scores, mass = mean(rows), mean(raw)
    maps = step_maps(rows[:, count:], steps).cpu() if steps else None
    valid = valid.cpu()
    traces = []
    for i, item in enumerate(found.encoded):
        own = valid[i]
        gaze = scores[i][own]
        _check(item, gaze, states[i][own], real[i], dtype)
        semantics, tokens = select(states[i][own], gaze, settings.semantics, settings.top_k)
        trajectory: tuple[Step, ...] = ()
        if maps is not None:
            parts = zip(steps[i].texts, steps[i].groups, maps[i], strict=False)  # maps are padded at the end
            trajectory = tuple(Step(text, group, _scaled(each[own], settings)) for text, group, each in parts)
        traces.append(
            Trace(
                sample_id=item.sample.id,
                answer=found.answers[i],
                tiles=tuple(span.tile for span in item.spans),
                gaze=_scaled(gaze, settings),
                semantics=semantics,
                mass=float(mass[i][own].sum()),
                semantic_tokens=tokens,
                steps=trajectory,
                blind_answer=None if blind is None else blind[i],
            )
        )
    return traces


def recording(backbone: Backbone, settings: ExtractSettings, index: Tensor) -> AttentionContext:
    """What a pass asks of the attention layers: the rows at ``index`` [B, R], averaged as the settings say.

    Raises:
        UserError: the teacher has no such layer or head.
    """
    config: Any = backbone.model.config
    pairs = settings.pairs(backbone.depth, int(config.get_text_config().num_attention_heads))
    layers = settings.depths(backbone.depth) if pairs is None else None
    return AttentionContext(rows=index, layers=layers, pairs=pairs, merged=True)


def answer_rows(encoded: Sequence[Encoded], steps: Sequence[Steps], kind: str) -> Tensor:
    """The rows of every token of the answers: long [B, T], -1 pads.

    Args:
        kind: 'predicting', the position before the token, whose logits choose it; or its 'own' position.
    """
    counts = torch.tensor([len(each.of_token) for each in steps])
    # The first label stands at the position that predicts the answer's first token.
    asked = [(item.labels >= 0) & ~emits(item.roles) for item in encoded]
    firsts = torch.stack([own.float().argmax() for own in asked]) + (kind == "own")
    token = torch.arange(int(counts.max()))
    return (firsts[:, None] + token).masked_fill(token >= counts[:, None], -1)


def state_layer(backbone: Backbone, layer: int) -> int | None:
    """The decoder layer whose output is kept, counted from 0; None for the last, whose states the model itself returns.

    Raises:
        UserError: the decoder has no such layer.
    """
    depth = backbone.depth
    if not -depth <= layer < depth:
        raise UserError(f"extract.semantics_layer: got {layer}; allowed: {-depth} to {depth - 1} (-1 is the last)")
    return None if layer % depth == depth - 1 else layer % depth


@contextmanager
def layer_states(backbone: Backbone, layer: int) -> Iterator[list[Tensor]]:
    """Keeps what one decoder layer gives in the first pass while it is open: a list that receives [B, S, D].

    Nothing is kept for the last layer: its states are the model's own output, after the final norm.
    """
    kept: list[Tensor] = []
    number = state_layer(backbone, layer)
    if number is None:
        yield kept
        return

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if not kept:
            kept.append(output[0] if isinstance(output, tuple) else output)

    layers: Any = backbone.family.decoder(backbone.model).layers
    handle = layers[number].register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def image_states(states: Tensor, roles: Tensor) -> Tensor:
    """The states of the image tokens [B, N, D], at least float32, on the CPU."""
    index = positions(roles == Role.IMAGE).clamp(min=0).to(states.device)
    picked = states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))
    return picked.to(torch.promote_types(states.dtype, torch.float32)).cpu()


def _scaled(scores: Tensor, settings: ExtractSettings) -> Tensor:
    """A map as it is stored."""
    if settings.normalisation == "minmax":
        return normalise(scores)
    if settings.normalisation == "distribution":
        return to_distribution(scores)
    return scores


def _check(item: Encoded, gaze: Tensor, states: Tensor, real: Tensor, dtype: torch.dtype) -> None:
    key = item.sample.id
    name = f"sample '{key}'"
    if not bool(real.any()):
        raise SampleError(key, f"{name} has no position of the kinds in extract.rows")
    if not bool(torch.isfinite(gaze).all() and torch.isfinite(states).all()):
        raise SampleError(
            key,
            f"the trace of {name} is not finite: the teacher's weights are damaged, "
            f"or its numbers overflow in {dtype} (teacher.dtype)",
        )
    if not bool(gaze.any()):
        raise SampleError(
            key,
            f"no recorded row of {name} sees its image: extract.rows names only words before the image, "
            "or extract.layers only layers whose window ends before it",
        )
