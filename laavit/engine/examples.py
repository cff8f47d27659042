"""Samples and traces of a given shape with random contents, to work out what a recipe takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from laavit.backbones.base import Backbone
from laavit.backbones.chat import IGNORED, PromptSettings
from laavit.backbones.rows import emits
from laavit.engine.shapes import Blueprint
from laavit.latents import LatentLayout, latent_tokens
from laavit.registry import UserError
from laavit.structures import AnswerLogits, Box, Encoded, Role, Sample, Span, Step, Tile, Trace

#: pictures among which a processor's most tokens are looked for, width and height; none it takes is larger
PICTURES = ((1536, 1536), (1536, 1024), (1024, 1536))


@dataclass(frozen=True)
class Load:
    """What one sample is assumed to hold, and what it runs on.

    Args:
        text: tokens of the system prompt, the question and the chat's markup.
        answer: tokens of the answer, its end included.
        gpus: processes that share a batch.
        questions: samples about one image, where the recipe groups them (``train.grouped``).
        image: width and height in pixels; None is what gives the most tokens that the processor allows.
    """

    text: int = 128
    answer: int = 16
    gpus: int = 1
    questions: int = 1
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, least in (("text", 8), ("answer", 1), ("gpus", 1), ("questions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: got {getattr(self, name)}; allowed: {least} or more")


def grid_of(config: Any, least: int, pixels: int, image: tuple[int, int] | None = None) -> tuple[int, int]:
    """The largest near-square grid of image tokens (height, width) within an area in pixels; or an image's own.

    Args:
        least, pixels: bounds of the area. image: width and height in pixels.

    Raises:
        UserError: no processor takes an image of that shape.
    """
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if image is not None:
        try:
            height, width = smart_resize(image[1], image[0], side, least, pixels)
        except ValueError as error:
            raise UserError(f"--image: got {image[0]}x{image[1]}: {error}") from None
        return height // side, width // side
    count = max(pixels // side**2, 1)
    root = math.isqrt(count)
    return max(((height, count // height) for height in range(max(root * 3 // 4, 1), root + 1)), key=math.prod)


def example(
    backbone: Backbone,
    plan: Blueprint,
    mode: FakeTensorMode,
    layout: LatentLayout,
    load: Load,
    pixels: tuple[int | None, int | None] = (None, None),
    prompt: PromptSettings | None = None,
) -> Encoded:
    """One sample of assumed length: roles, labels, spans and positions are real, its words and pixels are not.

    Where the number of latents varies it has the most.

    Args:
        pixels: the recipe's bounds of an image's area. prompt: how a question is put, where a processor puts it.
    """
    if plan.by_area:
        bounds = pixels[0] or plan.min_pixels, pixels[1] or plan.max_pixels
        return _by_area(backbone, grid_of(plan.config, *bounds, load.image), mode, layout, load)
    return _by_processor(backbone, replace(layout, least=None), load, prompt or PromptSettings())


def _by_area(
    backbone: Backbone, grid: tuple[int, int], mode: FakeTensorMode, layout: LatentLayout, load: Load
) -> Encoded:
    """Of a family whose images are one grid each; its processor need not be there."""
    latents = layout.most
    before, tokens, header = load.text // 2, grid[0] * grid[1], 3
    after = load.text - before - header
    answer = load.answer + (1 if latents else 0)  # the separator's query is an answer query
    roles = [Role.OTHER] * before + [Role.IMAGE] * tokens + [Role.QUESTION] * after + [Role.OTHER] * header
    roles += [Role.LATENT] * latents + [Role.ANSWER] * answer
    ids = torch.ones(len(roles), dtype=torch.long)
    ids[before : before + tokens] = backbone.family.image_token_id
    if latents:
        start = before + tokens + after + header
        ids[start : start + latents + 1] = torch.tensor(
            backbone.tokenizer.convert_tokens_to_ids(latent_tokens(latents))
        )
    labels = torch.full(ids.shape, IGNORED)
    labels[-load.answer - layout.written - 1 : -1] = 1
    merge, config = backbone.family.merge, backbone.model.config.vision_config  # type: ignore[union-attr]
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2  # type: ignore[union-attr, operator]
    with mode:
        patches = torch.empty(tokens * merge**2, int(size), dtype=next(backbone.model.parameters()).dtype)
    vision = {"image_grid_thw": torch.tensor([[1, grid[0] * merge, grid[1] * merge]])}
    return Encoded(
        input_ids=ids,
        roles=torch.tensor(roles, dtype=torch.uint8),
        labels=labels,
        spans=(Span(before, Tile(*grid)),),
        position_ids=backbone.family.positions(ids, vision),
        header=(before + tokens + after, before + tokens + after + header),
        vision={**vision, "pixel_values": patches},
        sample=_sample("?"),
    )


def _by_processor(backbone: Backbone, layout: LatentLayout, load: Load, prompt: PromptSettings) -> Encoded:
    """What the family's own processor makes of a blank picture, and of as many words as are assumed."""
    builder = backbone.builder(prompt, layout)
    sizes = PICTURES if load.image is None else (load.image,)
    drawn = [builder.prompt_of(_sample("?"), [Image.new("RGB", size)]) for size in sizes]
    most, size = max(zip(drawn, sizes, strict=True), key=lambda pair: len(pair[0].input_ids))
    text = len(most.input_ids) - sum(span.end - span.start + span.lead for span in most.spans) - layout.most
    asked = builder.prompt_of(_sample("?" + words(backbone, load.text - text)), [Image.new("RGB", size)])
    return builder.with_answer(asked, words(backbone, load.answer - 1) or "a")


def words(backbone: Backbone, count: int) -> str:
    """A text of about so many tokens."""
    each = len(backbone.tokenizer.encode(" a" * 8, add_special_tokens=False)) / 8
    return " a" * round(max(count, 0) / each)


def _sample(question: str) -> Sample:
    return Sample("plan", (Path("plan"),), question, "", (Box(0.25, 0.25, 0.75, 0.75),))


def stored_rows(settings: Mapping[str, Any], tokens: int) -> int:
    """How many image tokens' states a trace holds; 0 where they are pooled into one vector.

    Args:
        settings: of the extraction, as a store's header has them.
    """
    return {"full": tokens, "top_k_rows": min(settings["top_k"], tokens)}.get(settings["semantics"], 0)


def example_trace(tiles: tuple[Tile, ...], width: int, settings: Mapping[str, Any], item: Encoded) -> Trace:
    """A trace over a teacher's tiles. width: of its semantics. settings: of the extraction. item: what it is about."""
    words, kept = item.labels[(item.labels >= 0) & ~emits(item.roles)], settings.get("logits", 0)
    ids = torch.arange(kept).expand(len(words), -1)
    tokens = sum(tile.cells for tile in tiles)
    rows = stored_rows(settings, tokens)
    semantics = torch.rand(rows or 1, width)
    return Trace(
        sample_id="plan",
        answer="",
        tiles=tiles,
        gaze=torch.rand(tokens),
        semantics=semantics if rows else semantics[0],
        mass=1.0,
        semantic_tokens=torch.arange(rows) if rows else None,
        steps=() if settings["steps"] == "none" else (Step("", "", torch.rand(tokens)),),
        logits=AnswerLogits(words, ids, torch.full(ids.shape, -math.log(kept + 1))) if kept else None,
    )
