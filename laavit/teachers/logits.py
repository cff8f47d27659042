"""What a teacher expects at every token of the gold answer, read along it: the targets of logits distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laavit.backbones.base import Backbone
from laavit.registry import UserError
from laavit.structures import AnswerLogits, Encoded
from laavit.teachers.base import SampleError


def check_top_k(backbone: Backbone, k: int) -> None:
    """Raises: UserError: the teacher has fewer tokens than are to be kept."""
    vocabulary = int(backbone.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    if k > vocabulary:
        raise UserError(f"extract.logits: got {k}, and the teacher's vocabulary has {vocabulary} tokens")


def answer_logits(
    backbone: Backbone, states: Sequence[Tensor], answered: Sequence[Encoded], k: int
) -> list[AnswerLogits]:
    """The k most probable tokens at every token of the answers.

    The logarithm of the softmax is taken in float64, so that a small rest is not lost beside a probability near one.

    Args:
        states: of each sample, at the positions that predict its answer's tokens, after the final norm: [M, D].
        answered: the samples with the answer that is read.

    Raises:
        SampleError: logits that are not finite.
    """
    found = []
    for item, state in zip(answered, states, strict=True):
        logprobs, ids = backbone.logits(state).double().log_softmax(-1).topk(k)
        if not bool(torch.isfinite(logprobs).all()):
            key = item.sample.id
            raise SampleError(key, f"the answer logits of sample '{key}' are not finite (teacher.dtype)")
        found.append(AnswerLogits(item.labels[item.labels >= 0], ids.cpu(), logprobs.float().cpu()))
    return found


def predicting(hidden: Tensor, answered: Sequence[Encoded]) -> list[Tensor]:
    """The states that predict the answers' tokens, [M, D] each, of a right-padded pass over everything, [B, S, D]."""
    places = [(item.labels >= 0).nonzero().flatten() for item in answered]
    return [state[place.to(state.device)] for state, place in zip(hidden, places, strict=True)]


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and their ids: logits are distilled between models of one vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
