"""All questions of an image behind one prefix, so that a tiny model is trained without repeating the image.

A packed sequence is ``prefix (system, image) | slot 1 | ... | slot Q``. A slot holds a question, the assistant's header
and the answer, sees the prefix and itself, and has the positions it would have alone: the hidden states are those of
Q separate sequences in the processor's own chat template.

Shape letters beside the library's: ``Q`` questions an image, ``T`` tokens a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from laavit.attention import AttentionContext
from laavit.microlab.questions import PixelBox, Question, ask
from laavit.microlab.scenes import IMAGE_SIZE, Scene
from laavit.microlab.tiny import MERGE, PATCH
from laavit.traces.grids import boxes_to_mask

SIDE = IMAGE_SIZE // (PATCH * MERGE)
TOKENS = SIDE * SIDE
IGNORED = -100
_PLACE = "{question}"


class Part(IntEnum):
    """What a token of a slot is."""

    NONE = 0
    QUESTION = 1
    HEADER = 2
    ANSWER = 3


@dataclass
class Packed:
    """Packed sequences of B images.

    Args:
        input_ids, labels: long [B, S], labels already shifted. parts: uint8 [B, Q, T] of Part.
        first: long [B, Q], the position that predicts the answer's first token. answers: long [B, Q], that token.
        boxes: float [B, Q, N], the boxes as a distribution over the image tokens.
        gaze_rows: long [B, Q, G], the positions of the assistant's header and the answer.
    """

    input_ids: Tensor
    labels: Tensor
    parts: Tensor
    first: Tensor
    answers: Tensor
    boxes: Tensor
    gaze_rows: Tensor

    def __getitem__(self, index: Tensor | slice) -> Packed:
        return Packed(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.input_ids)


@lru_cache(maxsize=4096)
def box_distribution(boxes: tuple[PixelBox, ...]) -> Tensor:
    """The boxes' area over the 6 x 6 image tokens, summing to 1: [N]."""
    mask = boxes_to_mask(torch.tensor(boxes, dtype=torch.float64) / IMAGE_SIZE, SIDE, SIDE, torch.float64)
    # Edges at thirds are not exact in floating point: what is left of them on neighbouring tokens is no coverage.
    mask = mask.where(mask > 1e-6, 0)
    return (mask / mask.sum()).float()


class Packer:
    """Packs questions and runs a model on them.

    Args:
        processor: a Qwen2.5-VL processor. kinds: the questions of every image. width: T, tokens a slot.
        system: the system prompt, empty for the template's own.
    """

    def __init__(self, processor: Any, kinds: Sequence[str], width: int = 16, system: str = "") -> None:
        self.tokenizer, self.kinds, self.width = processor.tokenizer, tuple(kinds), width
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        content = [{"type": "image"}, {"type": "text", "text": _PLACE}]
        text = processor.apply_chat_template(
            [*messages, {"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        before, after = text.split(_PLACE)
        markup, header = after.split("<|im_start|>")
        self._encode = lru_cache(maxsize=4096)(lambda part: self.tokenizer.encode(part, add_special_tokens=False))
        self.prefix = self._encode(before.replace(processor.image_token, processor.image_token * TOKENS))
        self.markup, self.header = self._encode(markup), self._encode("<|im_start|>" + header)
        self.image = self.prefix.index(processor.image_token_id)
        self.length = len(self.prefix) + len(self.kinds) * width
        self.mask, self.positions = self._mask(), self._positions()

    def _mask(self) -> Tensor:
        """Bool [1, 1, S, S]: causal, and no slot sees another."""
        slot = torch.arange(self.length).sub(len(self.prefix)).div(self.width, rounding_mode="floor").clamp(min=-1)
        seen = (slot[None] == slot[:, None]) | (slot[None] < 0)
        return (seen & torch.ones(self.length, self.length, dtype=torch.bool).tril())[None, None]

    def _positions(self) -> Tensor:
        """Multi-axis rotary positions [3, 1, S]; every slot goes on where the prefix ends."""
        tail = len(self.prefix) - self.image - TOKENS
        cell = torch.arange(TOKENS)
        image = torch.stack([torch.zeros_like(cell), cell // SIDE, cell % SIDE]) + self.image
        after = self.image + SIDE
        slot = torch.arange(self.width) + after + tail
        parts = [torch.arange(self.image), image, torch.arange(tail) + after, slot.repeat(len(self.kinds))]
        return torch.cat([part.expand(3, -1) for part in parts], 1)[:, None]

    def pack(self, scenes: Sequence[Scene], salt: int = 0) -> Packed:
        """The scenes' questions, packed.

        Raises:
            ValueError: a question does not fit into a slot.
        """
        shape = (len(scenes), len(self.kinds))
        slots = torch.full((*shape, self.width), self.tokenizer.pad_token_id)
        labels, parts = torch.full_like(slots, IGNORED), torch.zeros(slots.shape, dtype=torch.uint8)
        first, answers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        boxes = torch.zeros(*shape, TOKENS)
        rows = torch.zeros(*shape, len(self.header) + 2, dtype=torch.long)
        for i, scene in enumerate(scenes):
            for j, question in enumerate(ask(scene, self.kinds, salt)):
                tokens, start, answer = self._slot(question)
                slots[i, j, : len(tokens)] = torch.tensor(tokens)
                labels[i, j, start : start + len(answer)] = torch.tensor(answer)
                header = start + 1 - len(self.header)
                parts[i, j, : header - len(self.markup)] = Part.QUESTION
                parts[i, j, header : start + 1] = Part.HEADER
                parts[i, j, start + 1 : len(tokens)] = Part.ANSWER
                offset = len(self.prefix) + j * self.width
                first[i, j], answers[i, j] = offset + start, answer[0]
                boxes[i, j] = box_distribution(question.boxes)
                rows[i, j] = offset + header + torch.arange(rows.shape[-1])
        prefix = torch.tensor(self.prefix).expand(len(scenes), -1)
        return Packed(
            input_ids=torch.cat([prefix, slots.flatten(1)], 1),
            labels=torch.cat([torch.full_like(prefix, IGNORED), labels.flatten(1)], 1),
            parts=parts,
            first=first,
            answers=answers,
            boxes=boxes,
            gaze_rows=rows,
        )

    def _slot(self, question: Question) -> tuple[list[int], int, list[int]]:
        """The slot's tokens, the place in it that predicts the answer, and the answer's tokens with its end."""
        answer = [*self._encode(question.answer), self.tokenizer.eos_token_id]
        asked = [*self._encode(question.text), *self.markup, *self.header]
        if len(asked) + len(answer) > self.width:
            raise ValueError(f"a slot has {self.width} tokens, {question.text!r} needs {len(asked) + len(answer)}")
        return asked + answer, len(asked) - 1, answer

    def hidden(self, model: Any, features: Tensor, packed: Packed, context: AttentionContext | None = None) -> Tensor:
        """The decoder's last states [B, S, D] for cached image features [B, N, D]."""
        batch = len(packed)
        return model.model(
            input_ids=packed.input_ids,
            position_ids=self.positions.expand(3, batch, -1),
            attention_mask=self.mask.expand(batch, 1, -1, -1),
            use_cache=False,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(features))},
            laavit=context,
        ).last_hidden_state

    def gaze(self, rows: Tensor, queries: int) -> Tensor:
        """Recorded rows [B, Q * G, S] -> their distributions over the image tokens [B, Q, G, N]."""
        looked = rows[:, :, self.image : self.image + TOKENS].unflatten(1, (-1, queries))
        return looked / looked.sum(-1, keepdim=True).clamp(min=torch.finfo(looked.dtype).tiny)
