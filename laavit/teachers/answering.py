"""The same traces from one reading of every prompt: recorded while the teacher answers.

Answering begins with a pass over the prompt, which gives the states of the image tokens and the rows of all positions
up to the answer. The answer's own rows come from one more pass over its words alone, on the prompt's cached keys and
values: O(T) queries in place of the whole prompt's. The answer is read as the sequence builder tokenises its text, as
in a second pass over everything; what was generated may be other tokens of the same text. Logits along the gold answer
(``extract.logits``) come from one more such pass, over the gold answer's words.

The cache keeps all keys of every layer: one that drops what a sliding window has left behind could not give a row back
to where the prompt ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from laavit.attention import AttentionContext
from laavit.backbones.base import Backbone, collate
from laavit.backbones.chat import SequenceBuilder
from laavit.backbones.rows import ROW_KINDS, image_rows, positions
from laavit.structures import AnswerLogits, Encoded, Role, Trace
from laavit.teachers.logits import answer_logits
from laavit.teachers.recording import asked, image_states, layer_states, recording, traces_of
from laavit.teachers.settings import ExtractSettings
from laavit.traces.tagger import Tagger


@torch.no_grad()
def answer_and_record(
    backbone: Backbone,
    builder: SequenceBuilder,
    prompts: Sequence[Encoded],
    settings: ExtractSettings,
    tagger: Tagger | None = None,
    blind: Sequence[str] | None = None,
) -> list[Trace]:
    """Greedy answers to generation prompts, and the traces that ``record`` reads off prompts with these answers.

    Raises:
        SampleError: a trace is not finite, or none of a sample's recorded rows sees its image.
    """
    length = max(len(prompt.input_ids) for prompt in prompts)
    shift = torch.tensor([length - len(prompt.input_ids) for prompt in prompts])  # left padding
    bare = [replace(prompt, vision={}, features=None) for prompt in prompts]  # where images stand, without pixels
    before = _prompt_rows(backbone, builder, bare, settings)  # [B, Q], positions in the prompts
    left = torch.where(before < 0, length - 1, before + shift[:, None])
    context, cache = recording(backbone, settings, left.to(backbone.device)), DynamicCache()
    with first_pass(backbone, context) as hidden, layer_states(backbone, settings.semantics_layer) as kept:
        answers = backbone.generate(prompts, settings.max_new_tokens, settings.repetition_penalty, cache)
    roles = torch.stack([F.pad(p.roles, (length - len(p.roles), 0), value=int(Role.OTHER)) for p in prompts])
    roles = roles.to(backbone.device)
    states = image_states(kept[0] if kept else hidden[0], roles)  # [B, N, D]
    recorded, valid = image_rows(context.mean_rows(), roles)  # [B, Q, N], [B, N]

    answered = [builder.with_answer(p, a) for p, a in zip(bare, answers, strict=True)]
    found = asked(backbone, answered, answers, settings, tagger)
    starts = length - shift
    if bool((found.index.cpu() >= starts[:, None]).any()):
        most = max(len(a.input_ids) - len(p.input_ids) for a, p in zip(answered, prompts, strict=True))
        words = torch.arange(most, device=backbone.device).expand(len(prompts), -1)
        after = recording(backbone, settings, words)
        backbone.go_on(prompts, answered, cache, after)
        more = after.mean_rows()[..., :length]  # [B, T, length]; no word of an answer is an image token
        recorded = torch.cat([recorded, image_rows(more, roles)[0]], 1)
    slots = _slots(before, starts, found.batch.roles.shape[1]).to(found.index)
    place = slots.gather(1, found.index.clamp(min=0))
    rows = recorded.gather(1, place[:, :, None].expand(-1, -1, recorded.shape[-1]))
    traces = traces_of(found, rows, valid, states, settings, hidden[0].dtype, blind)
    if not settings.logits:
        return traces
    gold = [builder.with_answer(prompt, prompt.sample.answer) for prompt in bare]
    logits = _along(backbone, bare, gold, cache, hidden[0][:, -1], settings.logits)
    return [replace(trace, logits=each) for trace, each in zip(traces, logits, strict=True)]


def _along(
    backbone: Backbone, prompts: Sequence[Encoded], gold: Sequence[Encoded], cache: DynamicCache, last: Tensor, k: int
) -> list[AnswerLogits]:
    """What is expected along the gold answers, read on the prompts' cached keys.

    Args:
        prompts: as they were answered. gold: with the gold answer. last: [B, D], the states where the prompts end: they
            predict the first token.
    """
    context = AttentionContext()
    with first_pass(backbone, context) as words:
        backbone.go_on(prompts, gold, cache, context)
    states = torch.cat([last[:, None], words[0]], 1)  # [B, 1 + T, D]
    counts = [int((item.labels >= 0).sum()) for item in gold]
    return answer_logits(backbone, [state[:count] for state, count in zip(states, counts, strict=True)], gold, k)


@contextmanager
def first_pass(backbone: Backbone, context: AttentionContext) -> Iterator[list[Tensor]]:
    """Hands a context to the decoder's first pass while it is open; a list that receives its states, [B, S, D]."""
    kept: list[Tensor] = []

    def give(module: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, named if kept else named | {"laavit": context}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if not kept:
            kept.append(output.last_hidden_state)

    decoder = backbone.family.decoder(backbone.model)
    handles = [decoder.register_forward_pre_hook(give, with_kwargs=True), decoder.register_forward_hook(keep)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _prompt_rows(
    backbone: Backbone, builder: SequenceBuilder, prompts: Sequence[Encoded], settings: ExtractSettings
) -> Tensor:
    """The prompts' positions whose rows any answer can ask for: long [B, Q], -1 pads."""
    starts = torch.tensor([len(prompt.input_ids) for prompt in prompts])
    # Which of a prompt's positions are of a kind does not depend on the words of the answer.
    batch = collate([builder.with_answer(p, "") for p in prompts], backbone.family, backbone.tokenizer.pad_token_id)
    place = torch.arange(batch.roles.shape[1])
    wanted = torch.stack([ROW_KINDS[kind](batch) for kind in settings.rows]).any(0)
    return positions((wanted & (place < starts[:, None])) | (place == starts[:, None] - 1))


def _slots(before: Tensor, starts: Tensor, width: int) -> Tensor:
    """Where the row of each position was put: the prompts' recorded ones ``before`` [B, Q], then the words' in order.

    Returns: long [B, width]; 0 for positions that were not recorded.
    """
    place = torch.arange(width).expand(len(starts), -1)
    slots = torch.where(place < starts[:, None], 0, before.shape[1] + place - starts[:, None])
    number = torch.arange(before.shape[1]).expand_as(before)
    pads = torch.where(before < 0, width, before)  # to a column of their own, which goes
    return F.pad(slots, (0, 1)).scatter(1, pads, number)[:, :width]
