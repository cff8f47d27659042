"""What is read off a teacher, as data; every combination is checked before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from laavit.backbones.chat import PromptSettings
from laavit.backbones.rows import check_kinds
from laavit.registry import SETTINGS, UserError, nearest
from laavit.traces.schema import SEMANTICS_DTYPES
from laavit.traces.semantics import SEMANTICS

ANSWERS = ("teacher", "gold")
NORMALISATIONS = ("none", "rows", "minmax", "distribution")
STEPS = ("none", "token", "word", "sentence", "group")
STEP_ROWS = ("predicting", "own")


@SETTINGS.register_module(name="extract")
@dataclass(frozen=True)
class ExtractSettings:
    """What is read off a teacher.

    Args:
        rows: T of Eq. 2: kinds of text positions whose attention is averaged.
        layers: decoder layers averaged, negative ones from the end, or 'last N'; None is all (Eq. 2).
        heads: heads averaged: a head h (in every one of ``layers``) or a pair [layer, h]; None is all (Eq. 2).
        normalisation: what a stored map is: 'none' (S_j of Eq. 2, shares of attention), 'rows' (every row, averaged
            over layers and heads, is scaled to sum 1 over the image tokens before the rows' mean), 'minmax' (Eq. 3) or
            'distribution' (S_j scaled to sum 1). ``Trace.mass`` is the raw share of attention in each case.
        gaze_top_k: store only the k strongest tokens of a map; None stores the whole map.
        semantics: V_sem: pooled over image tokens, 'gaze_top_k' (weighted by the strongest gaze), 'gaze' (by all of
            it) or 'mean'; or the states themselves, 'top_k_rows' (of the strongest tokens) or 'full' (of all).
        semantics_layer: whose states: -1 is the last decoder layer after the final norm (the paper), another one the
            output of that layer.
        semantics_dtype: what they are stored as: 'float32', 'float16' or 'bfloat16'.
        top_k: how many tokens 'gaze_top_k' and 'top_k_rows' keep (paper: 8).
        steps: one more map for each 'token', 'word' or 'sentence' of the answer, or for each run of words of one
            'group' (functional, object, attribute); 'none' keeps the aggregate alone.
        step_rows: the rows of a step: of the positions that are 'predicting' its tokens (where the choice is made), or
            of its tokens' 'own' positions.
        tagger: finds the words' groups: 'spacy:PATH_OR_NAME' or 'textblob'; None leaves the steps without a group.
        blind: who answers without the image: None nobody, 'teacher' the teacher itself, else the folder or hub name of
            a text-only causal language model.
        answer: whose words are read: the 'teacher' answers greedily, or the 'gold' answer is given.
        passes: how often a prompt is read for the teacher's answer: 1, its rows and states are recorded while it is
            answered, and the answer's words are read on the prompt's cached keys; or 2, answer and prompt are read
            together once more. Both record the same, up to rounding. A gold answer is always read in one pass.
        logits: at every token of the gold answer, the k most probable tokens and their log-probabilities are kept
            (whoever's ``answer`` it is whose attention is read); 0 keeps none.
        prompt_order: 'image_first' or 'question_first'.
        system: the teacher's system prompt; an empty one leaves it to the chat template.
        max_new_tokens: the longest answer. repetition_penalty: of the greedy answer (the authors' code: 1.05).
        batch_size: samples a pass. shard_size: samples a shard of the store.
        workers: processes that open images and tokenise; 0 does it in the main one.
    """

    rows: tuple[str, ...] = ("question", "header", "answer")
    layers: tuple[int, ...] | str | None = None
    heads: tuple[int | tuple[int, int], ...] | None = None
    normalisation: str = "none"
    gaze_top_k: int | None = None
    semantics: str = "gaze_top_k"
    semantics_layer: int = -1
    semantics_dtype: str = "float32"
    top_k: int = 8
    steps: str = "none"
    step_rows: str = "predicting"
    tagger: str | None = None
    blind: str | None = None
    answer: str = "teacher"
    passes: int = 1
    logits: int = 0
    prompt_order: str = "image_first"
    system: str = ""
    max_new_tokens: int = 64
    repetition_penalty: float = 1.0
    batch_size: int = 8
    shard_size: int = 128
    workers: int = 0

    def __post_init__(self) -> None:
        check_kinds("extract.rows", tuple(self.rows))
        for name, allowed in (
            ("normalisation", NORMALISATIONS),
            ("semantics", SEMANTICS),
            ("semantics_dtype", SEMANTICS_DTYPES),
            ("steps", STEPS),
            ("step_rows", STEP_ROWS),
            ("answer", ANSWERS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"extract.{name}: got '{value}'; {nearest(str(value), allowed)}")
        for name in ("top_k", "max_new_tokens", "batch_size", "shard_size", "gaze_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"extract.{name}: at least 1, got {value}")
        if self.passes not in (1, 2):
            raise UserError(f"extract.passes: got {self.passes}; allowed: 1, 2")
        for name in ("workers", "logits"):
            if getattr(self, name) < 0:
                raise UserError(f"extract.{name}: at least 0, got {getattr(self, name)}")
        if self.logits and self.answer == "teacher" and self.passes == 2:
            raise UserError("extract.logits: the gold answer is read on the prompt's cached keys, as in passes 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"extract.repetition_penalty: above 0, got {self.repetition_penalty}")
        if self.steps == "group" and self.tagger is None:
            raise UserError("extract.steps: 'group' needs extract.tagger ('spacy:PATH_OR_NAME' or 'textblob')")
        if self.blind == "":
            raise UserError("extract.blind: none, 'teacher' or a text-only language model, got an empty name")
        # One form each, so that equal settings have equal headers however they were written.
        object.__setattr__(self, "layers", _layers(self.layers))
        object.__setattr__(self, "heads", _heads(self.heads))
        if self.layers is not None and any(isinstance(head, tuple) for head in self.heads or ()):
            raise UserError(
                "extract.heads: a pair [layer, head] names its layer; leave extract.layers out beside pairs"
            )
        PromptSettings(order=self.prompt_order)
        if self.prompt_order == "question_first" and set(self.rows) == {"question"}:
            raise UserError("extract.rows: a question before the image cannot look at it; add 'header' or 'answer'")

    def pairs(self, depth: int, heads: int) -> dict[int, tuple[int, ...]] | None:
        """The heads averaged in each layer, for ``AttentionContext.heads``; None where all heads are.

        Args:
            depth: the teacher's decoder layers. heads: attention heads a layer.

        Raises:
            UserError: the teacher has no such layer or head.
        """
        found: dict[int, set[int]] = {}
        layers = self.depths(depth)
        for entry in self.heads or ():
            each = layers if isinstance(entry, int) else (_within("heads", entry[0], depth, "decoder layers"),)
            head = _within("heads", entry if isinstance(entry, int) else entry[1], heads, "heads a layer")
            for layer in each:
                found.setdefault(layer, set()).add(head)
        return {layer: tuple(sorted(found[layer])) for layer in sorted(found)} or None

    def depths(self, depth: int) -> tuple[int, ...]:
        """The recorded layers of a decoder of ``depth``, counted from its start.

        Raises:
            UserError: the teacher has no such layer.
        """
        if self.layers is None:
            return tuple(range(depth))
        return tuple(sorted({_within("layers", int(layer), depth, "decoder layers") for layer in self.layers}))

    def card(self) -> dict[str, Any]:
        """The settings as JSON data, for a store's header; those that change no bit of a trace are left out.

        So is ``logits`` where none are kept: such a store is what it was before there was the setting.
        """

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        left_out = {"workers"} if self.logits else {"workers", "logits"}
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"last[ _:]?(\d+)", value.strip())
        if not found or int(found[1]) < 1:
            raise UserError(f"extract.layers: got '{value}'; allowed: a list of layers, 'last N', or none for all")
        return tuple(range(-int(found[1]), 0))
    if not value:
        raise UserError("extract.layers: names no layer; leave it out for all")
    return tuple(value)


def _heads(value: Any) -> tuple[int | tuple[int, int], ...] | None:
    if value is None:
        return None
    if not value:
        raise UserError("extract.heads: names no head; leave it out for all")
    heads: list[int | tuple[int, int]] = []
    for entry in value:
        if isinstance(entry, int) and not isinstance(entry, bool):
            heads.append(entry)
        elif isinstance(entry, tuple | list) and len(entry) == 2 and all(isinstance(part, int) for part in entry):
            heads.append((int(entry[0]), int(entry[1])))
        else:
            raise UserError(f"extract.heads: got {entry!r}; allowed: a head, or a pair [layer, head]")
    return tuple(heads)


def _within(key: str, index: int, size: int, what: str) -> int:
    """An index, negative ones from the end, counted from the start."""
    if not -size <= index < size:
        raise UserError(f"extract.{key}: got {index}, and the teacher has {size} {what} ({-size} to {size - 1})")
    return index % size
