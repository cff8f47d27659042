"""The things that flow: Sample -> Trace -> Encoded -> Batch -> StudentOutput, and the legend of shape letters.

Shape letters, used in every signature and docstring of the library:

    B  batch            S  sequence length      N  image tokens of one sample (all its images, in order)
    K  latent tokens    H  attention heads      L  layers
    D  width            R  recorded rows        M  answer tokens (the separator's prediction included)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laavit.packing import Packing


class Role(IntEnum):
    """What a position of the sequence is; every position is exactly one of these."""

    OTHER = 0  # system prompt, chat markup, padding
    IMAGE = 1
    QUESTION = 2
    LATENT = 3
    ANSWER = 4  # the separator after the latents (its query predicts the first answer token) and the answer


@dataclass(frozen=True)
class Box:
    """A region of one image: normalised corners, 0 <= x1 < x2 <= 1, and the image's index within the sample."""

    x1: float
    y1: float
    x2: float
    y2: float
    image: int = 0


@dataclass(frozen=True)
class Sample:
    """One question about one or more images. ``id`` is unique within a data set; ``source`` is the set it came from."""

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()
    source: str = ""
    split: str = "train"
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """A grid of tokens over one image or over a part of it, row by row.

    Args:
        height, width: tokens. image: the image's index within the sample.
        region: the part of the image that it covers, normalised x1, y1, x2, y2.
    """

    height: int
    width: int
    image: int = 0
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def cells(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Span:
    """Where the tokens of one image, or of one tile of it, stand in the sequence.

    Args:
        start: position of the first. tile: what they cover.
        stride: positions from one row of tokens to the next; 0: the rows follow each other (no separators).
        lead: positions before the first that are the image's, too, and no part of the grid (a tower's registers).
    """

    start: int
    tile: Tile
    stride: int = 0
    lead: int = 0

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + (self.tile.height - 1) * (self.stride or self.tile.width) + self.tile.width

    @property
    def end(self) -> int:
        """The position after all that is the image's, separators after its last row included."""
        return max(self.stop, self.start + self.tile.height * self.stride)

    def positions(self) -> Tensor:
        """Every token's position, row by row: long [height * width]."""
        rows = torch.arange(self.tile.height) * (self.stride or self.tile.width)
        return (self.start + rows[:, None] + torch.arange(self.tile.width)).flatten()


@dataclass(frozen=True)
class Step:
    """One step of a teacher's trajectory: a token, word or sentence of its answer, or a group of tokens.

    Args:
        text: the words of the step. group: 'functional', 'object' or 'attribute' (Fig. 3), '' where nothing was tagged.
        gaze: float32 [N_t], the map of the step's own rows (as ``Trace.gaze``).
    """

    text: str
    group: str
    gaze: Tensor


@dataclass(frozen=True)
class AnswerLogits:
    """What a teacher expected at every token of the gold answer, read along it (teacher-forced).

    Args:
        tokens: long [M], the answer in the teacher's tokenizer, with what its family writes around it: its end, too.
        ids: long [M, k], the k tokens that were most probable at each, the most probable first.
        logprobs: float32 [M, k], their log-probabilities; what their sum lacks of 1 is on all other tokens.
    """

    tokens: Tensor
    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Trace:
    """What a teacher left behind for one sample.

    Args:
        sample_id: the sample it belongs to.
        answer: the teacher's own greedy answer.
        tiles: the teacher's image tokens: one tile an image, or several where its family cuts images up.
        gaze: float32 [N_t], S_j of Eq. 2, all tiles in order (N_t teacher image tokens): attention mass a token, not
            yet scaled (Eq. 3) or sparsified, so that shares of mass can be read off it (other settings of the
            extraction's ``normalisation`` store something else; the store's header says what).
        semantics: float32 [D_t], V_sem pooled as the extraction's settings say; or [M, D_t], the states of M tokens.
        mass: share of the recorded rows' attention that falls on image tokens at all, in [0, 1].
        semantic_tokens: long [M], the image tokens (indices into ``gaze``) whose states ``semantics`` holds; None where
            it is pooled.
        steps: the trajectory in steps, in order; empty where the extraction records only the aggregate.
        blind_answer: what a model answered that did not see the image; None where nothing was asked.
        logits: what the teacher expected along the gold answer; None where it was not recorded.
        verdicts: a filter's name -> whether the sample passes it.
        scores: a filter's name -> the figure behind the verdict (for example the attention mass inside the boxes).
    """

    sample_id: str
    answer: str
    tiles: tuple[Tile, ...]
    gaze: Tensor
    semantics: Tensor
    mass: float
    semantic_tokens: Tensor | None = None
    steps: tuple[Step, ...] = ()
    blind_answer: str | None = None
    logits: AnswerLogits | None = None
    verdicts: Mapping[str, bool] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids, made by the one sequence builder (laavit/backbones/chat.py).

    Args:
        input_ids: long [S]. roles: uint8 [S] of Role. labels: long [S], the token each position is asked to predict
            (already shifted: labels[i] is compared with the logits at i), -100 elsewhere.
        spans: one Span an image, or one a tile, in the order of their positions.
        position_ids: long [3, S] or [S], or None where the family needs none.
        header: positions of the assistant's header, (start, stop); its last one predicts what follows.
        vision: the processor's vision tensors (pixel_values, image_grid_thw, ...), or empty where features are cached.
        features: cached image features [N, D], or None.
        sample: what it was made from.
    """

    input_ids: Tensor
    roles: Tensor
    labels: Tensor
    spans: tuple[Span, ...]
    position_ids: Tensor | None
    header: tuple[int, int]
    vision: Mapping[str, Tensor]
    sample: Sample
    features: Tensor | None = None


@dataclass(frozen=True)
class SharedPrefix:
    """Samples that begin alike, with the same images: P distinct beginnings, each of which is read once.

    Args:
        owners: long [B], which of them each sample begins with. first: long [P], one sample of each.
        stops: long [P], how many positions each has; all image tokens are among them, and no question.
    """

    owners: Tensor
    first: Tensor
    stops: Tensor


@dataclass
class Batch:
    """Right-padded samples; no attention mask is needed, since a causal decoder never looks ahead into the padding."""

    input_ids: Tensor  # long [B, S]
    roles: Tensor  # uint8 [B, S]
    labels: Tensor  # long [B, S], shifted, -100 where nothing is asked
    position_ids: Tensor | None  # long [3, B, S] or [B, S]
    spans: list[tuple[Span, ...]]
    headers: list[tuple[int, int]]
    vision: dict[str, Tensor]
    samples: list[Sample]
    features: list[Tensor] | None = None
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # target's name -> what it prepared, padded
    shared: SharedPrefix | None = None  # then ``vision`` and ``features`` are those of its P beginnings
    packing: Packing | None = None  # then the decoder reads one row without the padding; the tensors here keep it

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on a device; copies from pinned memory are not waited for."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch with every tensor in pinned memory; torch's ``DataLoader`` asks for it by this name."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, SharedPrefix):
                return SharedPrefix(change(value.owners), change(value.first), change(value.stops))
            if isinstance(value, Packing):
                return value.changed(change)
            if isinstance(value, dict):
                return {key: changed(item) for key, item in value.items()}
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                return [changed(item) for item in value]
            return value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})


@dataclass
class StudentOutput:
    """What a student's forward gives: hidden states everywhere, logits only where labels are, rows where asked.

    Args:
        hidden: [B, S, D], after the decoder's final norm.
        logits: [M, V] at the positions of the whole batch that predict answers, in row-major order; [0] where the loss
            reads the states part by part. labels: long [M].
        rows: recorded attention rows by layer, [B, R, S] each.
        row_positions: the query positions of each kind of row, long [B, R_kind], -1 pads; the kinds stand in ``rows``
            one after another in this order.
        embeddings: what enters the decoder, [B, S, D], where a target asks for it: at image positions the patches.
        emitted: the same as logits and labels, ([E, V], long [E]), of latents and separators that the student writes
            itself; None where the prompt holds them.
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor
    rows: dict[int, Tensor] = field(default_factory=dict)
    row_positions: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    emitted: tuple[Tensor, Tensor] | None = None
