"""A teacher's answer in steps, and one gaze map for each: the trajectory A_traj(i, j) of Eq. 7.

Eq. 7 gives every latent j a map of its own; a map for each token, word, sentence or token group of the teacher's answer
is such a trajectory. A step's map is the mean of the attention rows of its tokens, and a token has two candidates: the
row of the position that *predicts* it, where what is to be said is looked for, and the row of its *own* position, where
it has been said. The end-of-turn token belongs to no step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laavit.registry import UserError
from laavit.traces.tagger import Tagger, Word, group_of

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"'’”)\]]*(?=\s|$)|(?=\n)|$)")


@dataclass(frozen=True)
class Steps:
    """An answer's steps.

    Args:
        texts: the words of each. groups: 'functional', 'object', 'attribute', or '' each.
        of_token: the step of every token of the answer, never falling.
    """

    texts: tuple[str, ...]
    groups: tuple[str, ...]
    of_token: tuple[int, ...]


def token_offsets(tokenizer: Any, answer: str, before: str = "") -> list[tuple[int, int]]:
    """The characters of the answer that each of its tokens covers, as the sequence builder tokenises it.

    Args:
        before: what the chat template writes between the header and the answer; its tokens cover nothing.

    Raises:
        UserError: the tokenizer cannot say which characters its tokens cover.
    """
    if not tokenizer.is_fast:
        raise UserError(f"extract.steps needs a fast tokenizer, which {type(tokenizer).__name__} is not; allowed: none")
    encoding = tokenizer(before + answer, add_special_tokens=False, return_offsets_mapping=True)
    return [(max(a - len(before), 0), max(b - len(before), 0)) for a, b in encoding["offset_mapping"]]


def split_answer(answer: str, offsets: Sequence[tuple[int, int]], kind: str, tagger: Tagger | None = None) -> Steps:
    """Cut an answer into steps.

    A token belongs to the step of its first character that is in one; a blank or empty token to the step after it. What
    several tokens spell together (one character in several bytes), or one token spells of several words, is one step.

    Args:
        answer: the text. offsets: the characters of each token (``token_offsets``).
        kind: 'token', 'word' (between blanks), 'sentence', or 'group' (runs of words of one group).
        tagger: names the groups of tokens and words; 'group' needs one.
    """
    words = tagger(answer) if tagger is not None and kind != "sentence" else []
    parts = _parts(answer, offsets, kind, words)
    place = torch.full((len(answer) + 1,), -1)
    for index, (start, stop) in enumerate(parts):
        place[start:stop] = index
    firsts = [next((int(p) for p in place[a:b] if p >= 0), -1) for a, b in offsets]
    for index in range(len(firsts) - 2, -1, -1):  # blanks lean on what follows
        firsts[index] = firsts[index + 1] if firsts[index] < 0 else firsts[index]
    for index in range(1, len(firsts)):  # and at the end on what came before
        firsts[index] = max(firsts[index], firsts[index - 1])
    used = sorted({first for first in firsts if first >= 0})
    if not used:  # no answer, or a blank one
        return Steps((), (), ())
    bounds = [*used[1:], len(parts)]
    texts = tuple(answer[parts[first][0] : parts[stop - 1][1]] for first, stop in zip(used, bounds, strict=True))
    groups = tuple(_group(parts[first], words, answer) if words else "" for first in used)
    number = {first: index for index, first in enumerate(used)}
    return Steps(texts, groups, tuple(number[first] for first in firsts))


def _parts(answer: str, offsets: Sequence[tuple[int, int]], kind: str, words: Sequence[Word]) -> list[tuple[int, int]]:
    """The characters of each step, in order and without overlap."""
    if kind == "word":
        return [found.span() for found in re.finditer(r"\S+", answer)]
    if kind == "sentence":
        return [found.span() for found in _SENTENCE.finditer(answer)]
    parts: list[tuple[int, int]] = []
    if kind == "token":
        for start, stop in offsets:
            if stop > start and (not parts or start >= parts[-1][1]):
                parts.append((start, stop))
        return parts
    before = None
    for start, stop, tag in words:
        if group_of(tag) == before:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
        before = group_of(tag)
    return parts


def _group(part: tuple[int, int], words: Sequence[Word], answer: str) -> str:
    """The group of the first word in a part of the answer that is more than punctuation; '' where there is none."""
    inside = [word for word in words if word[0] < part[1] and word[1] > part[0]]
    spelled = [word for word in inside if any(c.isalnum() for c in answer[word[0] : word[1]])]
    return group_of((spelled or inside)[0][2]) if inside else ""


def step_maps(rows: Tensor, steps: Sequence[Steps]) -> Tensor:
    """The mean of every step's rows.

    Args:
        rows: [B, T, N], a row for each token of the answers. steps: of every sample; T is at least its tokens.

    Returns: [B, M, N], zero beyond a sample's own steps (M: the most steps of a sample).
    """
    most = max((len(each.texts) for each in steps), default=0)
    of_token = torch.full(rows.shape[:2], most)
    for index, each in enumerate(steps):
        of_token[index, : len(each.of_token)] = torch.tensor(each.of_token, dtype=torch.long)
    member = F.one_hot(of_token.to(rows.device), most + 1)[..., :most].to(rows.dtype)  # [B, T, M]
    return member.transpose(1, 2) @ rows / member.sum(1)[..., None].clamp(min=1)
